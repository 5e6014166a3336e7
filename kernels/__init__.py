"""The Triton kernels, installed as fastmerge.kernels; the provider is `provider`.

Nothing is imported here: at the top of a checkout this folder also answers to `import kernels`, the name of a package
on PyPI that other libraries look for.
"""
