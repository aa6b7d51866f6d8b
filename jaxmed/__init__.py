"""Medical vision-language models in JAX: report generation and question answering on CT and X-ray."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`jaxmed.load` without importing JAX for commands that need none."""
    if name == "load":
        from jaxmed.api import load

        return load
    raise AttributeError(f"module 'jaxmed' has no attribute {name!r}")
