"""The run-time side of moegen: copied verbatim into every emitted package.

Imports torch, triton and the standard library alone, and nothing of moegen outside this folder.
"""
