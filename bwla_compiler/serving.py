"""Serving a packed model by transformers' own server, which must know the format before it loads one."""

from collections.abc import Sequence

from transformers.utils.import_utils import is_serve_available

from bwla_compiler.checkpoint import hf
from bwla_compiler.errors import BwlaError, CheckpointError

assert hf.METHOD  # importing it is what makes the format known


def serve(model: str, options: Sequence[str] = ()) -> None:
    """Run `transformers serve MODEL OPTIONS` in this process, until it is stopped.

    model: a folder or a hub id, packed or not. options: words of that command line. Raises CheckpointError where the
    packages that it needs are missing or the model does not load; typer's own errors for wrong options.
    """
    if not is_serve_available():
        raise CheckpointError("the server needs more packages: pip install 'bwla-compiler[serve]'")
    from transformers.cli.transformers import app

    try:
        app(["serve", model, *options], prog_name="bwla-compile", standalone_mode=False)
    except (OSError, ValueError) as error:
        if isinstance(error, BwlaError):
            raise
        raise CheckpointError(f"{model}: cannot be served: {str(error).strip()}") from error
