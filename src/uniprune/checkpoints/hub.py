"""Models on the Hub: what a name stands for, which files are there, and the download of those that are needed.

A name is ``owner/name``, or a name alone (``gpt2``); ``@revision`` after it is a branch, a tag or a commit, and a path after
that a folder of the repository or a GGUF file in it. The addresses that a browser shows mean the same. Nothing here needs
PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from uniprune.errors import InputError, first_line
from uniprune.storage.files import path_of

FORMS = "owner/name, owner/name@revision, owner/name/folder or owner/name/file.gguf"
NAME = r"\w[\w.-]*"
SPELLED = re.compile(
    rf"(?P<repository>{NAME}(/{NAME})?)(@(?P<revision>refs/(pr|convert)/[^/@]+|[^/@]+))?(/(?P<path>[^@]*[^/@]))?/?", re.ASCII
)
# What nobody names a repository: a name with one of these endings is meant as a path, unless it leads into a repository.
FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".upz", ".onnx", ".h5", ".zip")
OTHERS = ("datasets", "spaces", "kernels", "papers", "collections", "docs", "blog")  # of the Hub's pages: no models
VIEWS = ("tree", "blob", "resolve", "raw", "commit")  # pages of a revision
COMMIT = re.compile(r"[0-9a-f]{40}")


class Address(NamedTuple):
    """A model on the Hub. path: of a folder or a .gguf file in the repository; empty for all of it."""

    repository: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        safe = "/" if (self.revision or "").startswith("refs/") else ""
        revision = "" if self.revision is None else f"@{quote(self.revision, safe=safe)}"
        return f"{self.repository}{revision}" + (f"/{self.path}" if self.path else "")

    @property
    def url(self) -> str:
        """The page of the repository."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.repository}"


def parse(text: str) -> Address | None:
    """What a name or an address says; None if it can only be a path.

    Raises InputError for the address of something else.
    """
    if "://" in text:
        return _of_url(text)
    found = SPELLED.fullmatch(text)
    if found is None or {"", ".", ".."} & {*text.rstrip("/").split("/")}:
        return None
    if not found["path"] and found["repository"].lower().endswith(FILES):
        return None
    return Address(found["repository"], found["revision"] and unquote(found["revision"]), found["path"] or "")


def at_revision(name: str, revision: str | None) -> str:
    """A model's name with a revision, which it must not have yet. Raises InputError for what is no model of the Hub."""
    if revision is None:
        return name
    address = None if path_of(name).exists() else parse(name)
    if address is None:
        raise InputError(f"--revision {revision!r} is of a model on the Hub, and {name[:200]!r} is a path here; leave it out")
    if address.revision not in (None, revision):
        raise InputError(f"--revision {revision!r} and {name!r} name two revisions; leave one out")
    return str(address._replace(revision=revision))


def _of_url(text: str) -> Address:
    from huggingface_hub import constants

    url = urlsplit(text)
    words = [unquote(word) for word in f"{url.netloc if url.scheme == 'hf' else ''}/{url.path}".split("/") if word]
    words = words[1:] if words[:1] == ["models"] else words
    home = urlsplit(constants.ENDPOINT).netloc
    if url.scheme != "hf" and url.netloc not in ("huggingface.co", "hf.co", home):
        raise InputError(f"model {text[:200]!r} is an address, but none of {home}; download it and give its folder")
    if not words or words[0] in OTHERS:
        raise InputError(f"model {text[:200]!r} is the address of no model; give one that is like {FORMS}")
    if url.scheme == "hf":
        found = parse("/".join(words))
    else:
        view = next((place for place in (1, 2) if words[place : place + 1] and words[place] in VIEWS), None)
        named = words[:view] if view else words
        if len(named) > 2 or (view and len(words) < view + 2):
            raise InputError(f"model {text[:200]!r} is a page about a model; give the model: {'/'.join(named[:2])}")
        revision, path = _revision(words[view + 1 :]) if view else (None, [])
        found = Address("/".join(named), revision, "/".join(path))
    if found is None or SPELLED.fullmatch(str(found)) is None:
        raise InputError(f"model {text[:200]!r} is the address of no model; give one that is like {FORMS}")
    return found


def _revision(words: list[str]) -> tuple[str, list[str]]:
    """A revision, and what follows it: those of pull requests have slashes, whichever way they are written."""
    count = 3 if words[0] == "refs" else 1
    return "/".join(words[:count]), words[count:]


# ------------------------------------------------------------------------------------------------------------ the client


def listing(address: Address) -> list[str] | None:
    """The files of a repository, by their paths; None if the Hub does not say: there may be a copy in the cache.

    Raises InputError if the repository has no such revision.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        found = HfApi().model_info(address.repository, revision=address.revision)
    except (RevisionNotFoundError, HFValidationError) as error:
        raise _refusal(address, error) from error
    except Exception:  # whatever is wrong, the download meets it, too, if the cache is no way out
        return None
    return [file.rfilename for file in found.siblings or ()]


def download(address: Address, patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """The files of a repository that match, which may be in the cache already: the folder of its commit.

    Raises InputError that says why they cannot be downloaded, and what to do.
    """
    from huggingface_hub import snapshot_download

    with _asking(address):
        return Path(
            snapshot_download(
                address.repository,
                revision=address.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(ignored) or None,
            )
        )


def commit_of(snapshot: Path) -> str | None:
    """The commit whose files a folder of the cache has."""
    return snapshot.name if COMMIT.fullmatch(snapshot.name) else None


@contextmanager
def _asking(address: Address) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub client's errors have no base class short of this
        raise _refusal(address, error) from error


def _refusal(address: Address, error: Exception) -> InputError:
    """The error for what the client says: what is wrong, and what helps."""
    from huggingface_hub import constants, errors

    name, log_in = address.repository, "log in (hf auth login, or HF_TOKEN)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return InputError(f"model {name!r} does not exist here, and is no name on the Hub ({first_line(error)})")
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"model {name} is gated: accept its terms at {address.url}, then {log_in}")
    if isinstance(error, errors.DisabledRepoError):
        return InputError(f"model {name} was disabled by the Hub; give another one")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"model {name} has no revision {address.revision!r}; it has {_revisions(address)}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"model {name!r} does not exist here, nor on the Hub ({constants.ENDPOINT}); correct the name, or, if it is "
            f"private, {log_in}"
        )
    if status == 401:
        return InputError(f"model {name}: the Hub does not accept this login; {log_in} again")
    if constants.HF_HUB_OFFLINE:
        what = "is only in part in the Hub's cache" if _is_cached(address) else "does not exist here, nor in the Hub's cache"
        revision = f" at revision {address.revision}" if address.revision else ""
        return InputError(
            f"model {name}{revision} {what} ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set; unset it, or give a folder"
        )
    if isinstance(error, OSError) and error.errno is not None:  # of the disk: the client's own have no number
        place = constants.HF_HUB_CACHE
        return InputError(f"model {name} cannot be stored in {place}: {error.strerror}; set HF_HOME to another place")
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
    reason = first_line(cause if isinstance(cause, Exception) else error)
    return InputError(
        f"model {name} does not exist here, and could not be downloaded from {constants.ENDPOINT} ({reason}); try again: files "
        "that are complete are kept"
    )


def _is_cached(address: Address) -> bool:
    """Whether the cache has something of a model at its revision."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"models--{address.repository.replace('/', '--')}")
    reference = folder / "refs" / (address.revision or constants.DEFAULT_REVISION)
    commit = reference.read_text() if reference.is_file() else address.revision
    return commit is not None and (folder / "snapshots" / commit).is_dir()


def _revisions(address: Address) -> str:
    """Branches and tags of a repository, in words."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(address.repository)
    except Exception:  # it is only an advice
        return f"others, see {address.url}"
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} others" if len(names) > 8 else "")
