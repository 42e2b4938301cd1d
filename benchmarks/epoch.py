"""What does an epoch cost beyond the network's own forward and backward passes, and what do others pay?

Run: `python benchmarks/epoch.py [--quick] [--no-peers] [--threads 2]`. Batch 4 at 96^3, the default
augmentation; all are timed in turns in one process, so a busy machine slows all alike. `--no-peers` leaves
out MONAI and TorchIO.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from synthetic_store import synthetic_store

from brainage_nb.models.compute import choose_precision
from brainage_nb.models.fit import Trainer, VolumeDataset, huber_loss
from brainage_nb.models.resume import StopRequests
from brainage_nb.models.settings import TrainingSettings, list_members
from brainage_nb.volumes.augment import augment
from brainage_nb.volumes.settings import AugmentationSettings

BATCH, SIZE, SPACING = 4, 96, 2.0
BARS = {"cpu": 1.15, "cuda": 1.10}


class Bare:
    """Forward and backward passes on tensors on the device already; with `update`, AdamW's step too."""

    def __init__(self, fit: Trainer, steps: int, *, update: bool):
        device = fit.accelerator.device
        self.fit, self.steps, self.update = fit, steps, update
        self.volumes = torch.randn(BATCH, 1, SIZE, SIZE, SIZE, device=device)
        self.age = torch.linspace(20, 80, BATCH, device=device)

    def epoch(self) -> None:
        model, accelerator = self.fit.model, self.fit.accelerator
        model.train()
        for _ in range(self.steps):
            accelerator.backward(huber_loss(model(self.volumes), self.age).mean())
            if self.update:
                self.fit.optimiser.step()
            self.fit.optimiser.zero_grad()


class Ours:
    """A training epoch as the package does it: input, augmentation, clipping, AdamW, weight average."""

    def __init__(self, fit: Trainer):
        self.fit = fit

    def epoch(self) -> None:
        self.fit.position = 0
        self.fit.train_epoch(StopRequests(), lambda _: None)


class Loader:
    """A training epoch over a DataLoader of another library's dataset, with a plain AdamW step."""

    def __init__(self, fit: Trainer, dataset, workers: int):
        self.fit = fit
        self.loader = torch.utils.data.DataLoader(
            dataset, BATCH, shuffle=True, num_workers=workers, persistent_workers=True, collate_fn=stacked
        )

    def epoch(self) -> None:
        model, accelerator, device = self.fit.model, self.fit.accelerator, self.fit.accelerator.device
        model.train()
        for volumes, age in self.loader:
            volumes, age = volumes.to(device), age.to(device)
            accelerator.backward(huber_loss(model(volumes), age).mean())
            self.fit.optimiser.step()
            self.fit.optimiser.zero_grad()


def stacked(samples: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Volumes and ages of a batch as plain tensors; MONAI's random transforms turn some ages into tensors."""
    volumes = torch.stack([torch.as_tensor(sample["image"]).float() for sample in samples])
    return volumes, torch.tensor([float(sample["age"]) for sample in samples])


def make_fit(work: Path, store, splits, accelerator, settings: TrainingSettings) -> Trainer:
    """A model ready to train."""
    volumes = VolumeDataset(store, splits, accelerator.device)
    member = list_members(splits, settings)[0]
    return Trainer(volumes, splits, member, settings, accelerator, work / "run", {})


def write_scans(folder: Path, n: int) -> list[dict]:
    """Made-up 1 mm scans as .nii.gz, with ages."""
    import nibabel

    folder.mkdir()
    draw = np.random.default_rng(0)
    head = np.zeros((192, 224, 192), np.int16)
    head[30:160, 20:200, 20:180] = draw.integers(100, 900, (130, 180, 160))
    rows = []
    for number in range(n):
        path = folder / f"{number}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(np.roll(head, number, 0), np.eye(4)), path)
        rows.append({"image": str(path), "age": float(20 + number)})
    return rows


def monai_chains(settings: AugmentationSettings) -> tuple[list, list]:
    """(preprocessing, augmentation) of the same steps, ranges and probabilities with MONAI's transforms."""
    from monai import transforms as t

    key, extent = "image", SIZE * SPACING / 2
    chain = [
        t.LoadImaged(key, image_only=True),
        t.EnsureChannelFirstd(key),
        t.Orientationd(key, "RAS"),
        t.Spacingd(key, (SPACING,) * 3),
        t.ResizeWithPadOrCropd(key, (SIZE,) * 3),
        t.NormalizeIntensityd(key),
        t.EnsureTyped(key, track_meta=False),
    ]
    turn, sigma = np.deg2rad(settings.rotation_deg), settings.blur_mm / 2.355 / SPACING
    random = [
        t.RandFlipd(key, prob=settings.flip, spatial_axis=0),
        t.RandAffined(
            key,
            prob=settings.pose,
            rotate_range=(turn,) * 3,
            scale_range=(settings.scale,) * 3,
            translate_range=(settings.shift_mm / SPACING,) * 3,
            padding_mode="border",
        ),
        t.RandGridDistortiond(
            key,
            prob=settings.deformation,
            num_cells=6,
            distort_limit=settings.deformation_mm / extent,
            padding_mode="border",
        ),
        t.RandGaussianSmoothd(key, (0, sigma), (0, sigma), (0, sigma), prob=settings.blur),
        t.RandBiasFieldd(key, coeff_range=(0.0, settings.log_bias), prob=settings.bias_field),
        t.RandAdjustContrastd(key, prob=settings.gamma, gamma=(0.78, 1.28)),
        t.RandGaussianNoised(key, prob=settings.noise, std=settings.noise_sd),
        t.NormalizeIntensityd(key),
    ]
    return chain, random


def peers(work: Path, fit: Trainer, steps: int, workers: int) -> dict[str, Loader]:
    """Loaders that a user would otherwise write, over the same number of 1 mm scans."""
    from monai import data
    from monai.transforms import Compose

    rows = write_scans(work / "scans", steps * BATCH)
    chain, random = monai_chains(AugmentationSettings())
    both = Compose([*chain, *random])
    made = {
        "MONAI Dataset": Loader(fit, data.Dataset(rows, both), workers),
        "MONAI PersistentDataset": Loader(
            fit, data.PersistentDataset(rows, both, cache_dir=work / "cache"), workers
        ),
        "MONAI CacheDataset": Loader(fit, data.CacheDataset(rows, both, progress=False), workers),
    }
    torchio = torchio_dataset(rows)
    if torchio is not None:
        made["TorchIO SubjectsDataset"] = Loader(fit, torchio, workers)
    return made


def torchio_dataset(rows: list[dict]):
    """The same with TorchIO where it is installed, else None."""
    try:
        import torchio as tio
    except ImportError:
        print("TorchIO is not installed: left out")
        return None
    s = AugmentationSettings()
    transform = tio.Compose(
        [
            tio.ToCanonical(),
            tio.Resample(SPACING),
            tio.CropOrPad(SIZE),
            tio.ZNormalization(),
            tio.RandomFlip(axes=0, flip_probability=s.flip),
            tio.RandomAffine(scales=s.scale, degrees=s.rotation_deg, translation=s.shift_mm, p=s.pose),
            tio.RandomElasticDeformation(max_displacement=s.deformation_mm, p=s.deformation),
            tio.RandomBlur(std=(0, s.blur_mm / 2.355), p=s.blur),
            tio.RandomBiasField(coefficients=s.log_bias, p=s.bias_field),
            tio.RandomGamma(log_gamma=s.log_gamma, p=s.gamma),
            tio.RandomNoise(std=(0, s.noise_sd), p=s.noise),
        ]
    )
    subjects = [tio.Subject(image=tio.ScalarImage(row["image"]), age=row["age"]) for row in rows]
    dataset = tio.SubjectsDataset(subjects, transform=transform)

    class Plain(torch.utils.data.Dataset):
        def __len__(self):
            return len(dataset)

        def __getitem__(self, index):
            subject = dataset[index]
            return {"image": subject["image"].data, "age": subject["age"]}

    return Plain()


def timed(contenders: dict, rounds: int, device: torch.device) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Wall and processor seconds of an epoch of each (columns), round by round, in turns, one to warm up.

    Processor time leaves out loader processes; for what runs in this process it is what a busy machine cannot
    blur.
    """
    wall, processor = [], []
    for _ in range(rounds + 1):
        started = {}
        for name, contender in contenders.items():
            before = time.perf_counter(), time.process_time()
            contender.epoch()
            if device.type == "cuda":
                torch.cuda.synchronize()
            started[name] = time.perf_counter() - before[0], time.process_time() - before[1]
        wall.append({name: pair[0] for name, pair in started.items()})
        processor.append({name: pair[1] for name, pair in started.items()})
    return pd.DataFrame(wall[1:]), pd.DataFrame(processor[1:])


def augmentation_seconds(fit: Trainer, n: int = 24) -> float:
    """Seconds that augmenting one volume takes, averaged over `n` draws."""
    volumes = torch.randn(BATCH, 1, SIZE, SIZE, SIZE, device=fit.accelerator.device)
    started = time.perf_counter()
    for number in range(n // BATCH):
        augment(volumes.clone(), AugmentationSettings(), SPACING, [(0, number, row) for row in range(BATCH)])
    return (time.perf_counter() - started) / n


def main() -> None:
    """Time all contenders in turns; print a table, and as the last line the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds, no peers")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    steps, rounds = (3, 2) if options.quick else (options.steps, options.rounds)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    from accelerate import Accelerator

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = TrainingSettings(batch_size=BATCH, checkpoint_minutes=1e9)
    mixed = choose_precision(settings, device).replace("fp32", "no")
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        store, splits = synthetic_store(work / "volumes", steps * BATCH * 3 // 2, SIZE, SPACING)
        fit = make_fit(work, store, splits, accelerator, settings)
        contenders = {
            "forward and backward": Bare(fit, steps, update=False),
            "forward, backward, AdamW": Bare(fit, steps, update=True),
            "ours": Ours(fit),
        }
        if not (options.quick or options.no_peers):
            contenders |= peers(work, fit, steps, workers=2)
        report(timed(contenders, rounds, device), steps, device, augmentation_seconds(fit))


def report(seconds: tuple, steps: int, device: torch.device, augmentation: float) -> None:
    """Print the table of the fastest rounds and the verdict."""
    wall, processor = (times.min() for times in seconds)
    bare = "forward and backward"
    table = pd.DataFrame(
        {
            "seconds an epoch": wall,
            "over bare": wall / wall[bare],
            "processor seconds": processor,
            "over bare, processor": processor / processor[bare],
        }
    )
    print(table.round(3).to_string())
    print("default augmentation:", json.dumps(asdict(AugmentationSettings())))
    print(f"augmentation alone: {1000 * augmentation:.1f} ms a volume")
    ratio = {name: float(value) for name, value in table["over bare"].items()}
    worst = ratio["ours"]
    others = {name: value for name, value in ratio.items() if name.startswith(("MONAI", "TorchIO"))}
    outcome = {
        "name": "epoch",
        "value": round(worst, 3),
        "bar": BARS[device.type],
        "holds": bool(worst <= BARS[device.type] and all(value > worst for value in others.values())),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "seconds_a_step": round(wall[bare] / steps, 3),
        "ratios": {name: round(value, 3) for name, value in ratio.items()},
        "processor_ratio": round(float(table.loc["ours", "over bare, processor"]), 3),
    }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
