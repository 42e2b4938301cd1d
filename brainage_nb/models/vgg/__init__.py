"""The classic baseline: VGG16 features and support vector regression. `models.vgg_svr` is the model."""
