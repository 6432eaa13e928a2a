"""moegen: the description of a Mixture-of-Experts layer in, a package of specialised Triton kernels out."""

__version__ = "0.1.0"
