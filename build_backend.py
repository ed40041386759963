"""setuptools' build backend, and one sentence that says what to type where setuptools is missing or too old to read pyproject.toml."""

NEEDED = 77  # the first that reads `license = "Apache-2.0"` there

try:
    import setuptools
    from setuptools.build_meta import *  # noqa: F403
except ModuleNotFoundError as error:
    raise SystemExit(f"lifeops: building needs setuptools {NEEDED} or newer, and there is none here: pip install -U setuptools") from error

if int(setuptools.__version__.split(".")[0]) < NEEDED:
    found = f"setuptools {setuptools.__version__} is too old, {NEEDED} or newer is needed"
    raise SystemExit(f"lifeops: {found}: pip install -U setuptools")
