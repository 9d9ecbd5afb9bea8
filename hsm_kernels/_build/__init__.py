"""How the native library is described, compiled and cached.

setup.py loads this folder by its path, before the package can be imported. So nothing in it
imports torch or the rest of hsm_kernels.
"""
