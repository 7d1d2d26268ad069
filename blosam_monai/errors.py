"""What a user reads when something is wrong: one line, of the innermost cause."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tqdm import tqdm

from blosam_monai.files import PathLike


def root_cause(error: BaseException) -> BaseException:
    """MONAI wraps what a config or a transform raises; a user needs the innermost of the wrapped."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def one_line(error: BaseException) -> str:
    """The message of an error in one line; with its kind where it is none that we raise for users."""
    cause = root_cause(error)
    text = " ".join(str(cause).split())
    return text if isinstance(cause, (ValueError, OSError)) and text else f"{type(cause).__name__}: {text}"


def without_names(text: str, *paths: PathLike) -> str:
    """A message without the given paths, their names, whatever else looks like a path, quoted text and DICOM UIDs.

    >>> without_names("/data/Doe John/ct.nii.gz: is cut short; see ct.", "/data/Doe John/ct.nii.gz")
    '<file>: is cut short; see <file>.'
    >>> without_names("ct: holds 2 series: 'Thorax of Doe' 512 x 512 x 40 UID 1.2.840.113619.2.1 ; choose one.", "ct")
    "<file>: holds 2 series: '...' 512 x 512 x 40 UID <uid> ; choose one."
    """
    known: set[str] = set()
    for path in (form for given in paths for form in (Path(given), Path(given).resolve())):
        held = list(path.iterdir()) if path.is_dir() else []
        known |= {str(part) for part in (path, *path.parents, *held)}
        known |= {name for part in (path, *path.parents, *held) for name in (part.name, part.name.split(".")[0])}
    for name in sorted((name for name in known if len(name) > 1), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "<file>", text)
    text = re.sub(r"(<file>)?[^\s'\"(]*[/\\][^\s'\":;,)]*", "<file>", text)
    text = re.sub(r"'(?!<file>')[^']*'", "'...'", text)
    return re.sub(r"\b\d+(\.\d+){4,}\b", "<uid>", text)


def tell(text: str) -> None:
    """Say a line on the terminal, above the progress bars; never in a log, since it may name a file."""
    tqdm.write(f"blosam: {text}", file=sys.stderr)
