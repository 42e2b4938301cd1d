#!/usr/bin/env bash
# Runs a command in a private copy of this machine's file system that has Colab's or Kaggle's folders at their
# real places. Called inside new user, mount and network namespaces, so nothing outside is touched or reached.
#
#   enter.sh EMPTY_FOLDER FOLDER_WITH_PLATFORM_ROOTS COMMAND...
#
# FOLDER_WITH_PLATFORM_ROOTS holds any of content/, kaggle/ (its input/ becomes read-only) and etc/hosts.
set -euo pipefail
root=$1 given=$2
shift 2

mount -t tmpfs tmpfs "$root"
for entry in /*; do
  name=$(basename "$entry")
  case $name in content | kaggle) continue ;; esac
  if [ -L "$entry" ]; then
    cp -P "$entry" "$root/$name"
  elif [ -d "$entry" ]; then
    mkdir "$root/$name"
    mount --rbind "$entry" "$root/$name"
  fi
done
for name in content kaggle; do
  if [ -d "$given/$name" ]; then
    mkdir "$root/$name"
    mount --bind "$given/$name" "$root/$name"
  fi
done
if [ -d "$root/kaggle/input" ]; then
  mount --bind "$given/kaggle/input" "$root/kaggle/input"
  mount -o remount,bind,ro "$root/kaggle/input"
fi
if [ -f "$given/etc/hosts" ]; then mount --bind "$given/etc/hosts" "$root/etc/hosts"; fi
exec chroot "$root" "$@"
