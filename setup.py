"""What pyproject.toml cannot say yet: the loops in C. All else stands there."""

from setuptools import Extension, setup

kernels = Extension(
    "gptoss_convert.codecs.mxfp4._kernels",
    ["gptoss_convert/codecs/mxfp4/kernels.c"],
    # No fused multiplications: sums are the same on every machine.
    extra_compile_args=["-O3", "-ffp-contract=off", "-g0"],
    # Where a processor has no fused multiply-add.
    libraries=["m"],
    # Where there is no compiler, the package installs without them, and numpy does the work.
    optional=True,
    # Nothing of Python's is in them: one build serves every version.
    py_limited_api=True,
)
setup(ext_modules=[kernels], options={"bdist_wheel": {"py_limited_api": "cp311"}})
