"""Files of records → a pull request on a dataset repository of the Hugging Face hub, proposed once however often it is tried."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from harness_ext.errors import PublishError

ATTEMPTS = 5
"""To reach the hub, before it is given up."""
WAIT = 2.0
"""Seconds before the second attempt; twice as long before each further one."""
LONGEST_WAIT = 60.0
"""Seconds, also where the hub asks for more."""
BUSY = frozenset({408, 429, 500, 502, 503, 504})
"""What the hub answers when the same may succeed later."""

_Found = TypeVar("_Found")


def propose(repository: str, files: Mapping[str, bytes]) -> str:
    """The address of a pull request that adds those `files` (path → content) that are not there; empty where all are.

    A request that is lost on its way back may have been carried out, so that before each attempt it is looked up: a file's name
    holds the hash of what is in it, and the request's title that of the names. Raises PublishError in one line.
    """
    hub = HfApi()
    there = _keep_trying(
        repository, lambda: set(hub.list_repo_files(repository, repo_type="dataset")), attempts=1
    )  # it tries again itself
    new = {path: content for path, content in sorted(files.items()) if path not in there}
    return _keep_trying(repository, lambda: _propose_once(hub, repository, new), attempts=ATTEMPTS) if new else ""


def _propose_once(hub: HfApi, repository: str, new: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256("\n".join(new).encode()).hexdigest()[:12]
    title = f"harness_ext: {len(new)} run{'s' if len(new) > 1 else ''} [{digest}]"
    for found in hub.get_repo_discussions(
        repository, repo_type="dataset", discussion_type="pull_request", discussion_status="open"
    ):
        if found.title == title:
            return str(found.url)
    commit = hub.create_commit(
        repository,
        [CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in new.items()],
        commit_message=title,
        commit_description="Records of harness_ext, checked before they were sent; `harness-ext validate` checks them again.\n\n"
        + "\n".join(f"- {path}" for path in new),
        repo_type="dataset",
        create_pr=True,
    )
    return str(commit.pr_url)


def _keep_trying(repository: str, act: Callable[[], _Found], attempts: int) -> _Found:
    """What `act` gives, tried again while the hub is busy or not to be reached."""
    for attempt in range(1, attempts + 1):
        try:
            return act()
        except OfflineModeIsEnabled:
            raise PublishError(
                f"{repository}: HF_HUB_OFFLINE is set, so the hub was not asked; unset it, and publish again"
            ) from None
        except (HFValidationError, LocalTokenNotFoundError) as error:
            raise PublishError(
                f"{repository}: {_first_line(error)}; give ORG/NAME of a dataset, and log in with `hf auth login`"
            ) from None
        except HTTPError as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status is not None and status not in BUSY:
                raise PublishError(f"{repository}: the hub answered {status}: {_explain(status, error)}") from None
            if attempt == attempts:
                found = f"answered {status}" if status else f"could not be reached ({type(error).__name__})"
                raise PublishError(
                    f"{repository}: the hub {found} and was given up; nothing is lost: publish again later, and what has arrived is not sent twice"
                ) from None
            time.sleep(_choose_wait(error, attempt))
    raise AssertionError("the last attempt returns or raises")


def _explain(status: int, error: Exception) -> str:
    if status == 401:
        return "no token, or one that is not valid; log in with `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return "the token may not do that; use one that may write discussions and pull requests"
    if status == 404:
        return "no such dataset, or none that this token may see; make it first, or correct its name"
    return _first_line(error)


def _choose_wait(error: Any, attempt: int) -> float:
    """Seconds: what the hub asks for, or twice as long each time."""
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(asked) if asked.isdecimal() else WAIT * 2 ** (attempt - 1), LONGEST_WAIT)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
