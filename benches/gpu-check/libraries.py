#!/usr/bin/env python3
"""Where Python's packages keep NVIDIA's libraries, and which versions of what a comparison needs are here.

    libraries.py directories    directories that hold shared libraries, separated by colons
    libraries.py versions       one line "package version" for each package that is installed

Packages of CUDA 12 have a directory per library (nvidia/cublas/lib), those of CUDA 13 one for all
(nvidia/cu13/lib). Nothing is imported but Python's own modules, so this takes no time.
"""

import glob
import importlib.metadata
import os
import site
import sys
import sysconfig

PACKAGES = ["torch", "transformers", "peft", "nvidia-cublas", "nvidia-cublas-cu12", "nvidia-nccl-cu12",
            "nvidia-nccl-cu13", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"]


def roots():
    """Directories that packages are installed in."""
    candidates = [sysconfig.get_paths()[key] for key in ("purelib", "platlib")]
    candidates += site.getsitepackages() + [site.getusersitepackages()] + sys.path
    return dict.fromkeys(os.path.abspath(path) for path in candidates if path and os.path.isdir(path))


def directories():
    """Directories with the libraries that gradtx can use."""
    found = {}
    for root in roots():
        for name in ("libcublasLt.so*", "libnccl.so*", "libnvrtc.so*"):
            for library in sorted(glob.glob(os.path.join(root, "nvidia", "*", "lib", name))):
                found[os.path.dirname(library)] = None
    return list(found)


def versions():
    """Package and version of what is installed."""
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) == 2 else ""
    if what == "directories":
        print(":".join(directories()))
    elif what == "versions":
        for name, version in versions():
            print(name, version)
    else:
        sys.exit(__doc__)
