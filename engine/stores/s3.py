"""S3: large files in parts that are completed last, sums that the store tells, conditional puts.

Through s3fs's own call of the S3 operations, so that what is configured for it (endpoint, profile,
encryption) is so here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import sys
from collections.abc import Mapping
from typing import Any, Final

from crosstrain.engine.errors import warn_user
from crosstrain.engine.storage.errors import CheckpointWarning
from crosstrain.engine.storage.locations import StorePath

from .store import PIECE, Store, Stored, in_pieces

# S3 takes at most 10,000 parts.
_MOST_PARTS: Final = 9_000
# An upload that S3 has lost is begun anew so often.
_UPLOADS: Final = 3
# What they draw for their pauses would move the random state of the run.
_DRAWING: Final = ("botocore.utils", "botocore.retryhandler", "aiohttp.connector")


def s3_options(configured: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an `s3fs.S3FileSystem` is made with, beside what the user has set for fsspec."""
    own: Any = configured.get("s3", {}).get("config_kwargs") or {}
    return {"config_kwargs": {"retries": {"total_max_attempts": 1}, **own}}


class _UploadGone(OSError):
    """S3 does not know an upload any more: it has expired, or a rule has ended it."""


class S3Store(Store):
    """A folder of a bucket; its file system is an `s3fs.S3FileSystem` of our own."""

    def __init__(self, place: StorePath, filesystem: Any, root: str) -> None:
        super().__init__(place, filesystem, root)
        self._is_object_store = True
        # `patience` repeats; both would multiply.
        filesystem.retries = 1
        own = random.Random()
        for name in _DRAWING:
            module: Any = sys.modules.get(name)
            if getattr(module, "random", None) is random:
                module.random = own

    def _key(self, name: str) -> dict[str, str]:
        bucket, key, _ = self.fs.split_path(self.at(name))
        return {"Bucket": bucket, "Key": key}

    def _stored(self, info: Any) -> Stored:
        found = super()._stored(info)
        etag = info.get("ETag")
        md5 = etag.strip('"') if isinstance(etag, str) else None
        return Stored(found.name, found.size, found.is_folder, md5, found.version, found.modified)

    def _create(self, name: str, data: bytes) -> None:
        try:
            self.fs.call_s3("put_object", **self._key(name), Body=data, IfNoneMatch="*")
        except OSError as error:
            if _code(error) in ("NotImplemented", "501", "InvalidArgument", "InvalidRequest"):
                warn_user(
                    f"{self.place} has no conditional put: two runs that begin to save there at "
                    "the same moment would not notice each other",
                    CheckpointWarning,
                )
                self._create_unconditionally(name, data)
                return
            if _code(error) not in ("PreconditionFailed", "412"):
                raise
            # The first answer may have been lost, and this be the second try.
            if self.fs.cat_file(self.at(name)) != data:
                raise FileExistsError(errno.EEXIST, f"{name} is there already") from None

    def _create_unconditionally(self, name: str, data: bytes) -> None:
        try:
            self.fs.call_s3("head_object", **self._key(name))
        except FileNotFoundError:
            self.fs.call_s3("put_object", **self._key(name), Body=data)
        else:
            raise FileExistsError(errno.EEXIST, f"{name} is there already")

    def upload(self, name: str, descriptor: int, size: int) -> None:
        """Puts a file as `Store.upload` does."""
        part_size = _part_size(size)
        tries = 1
        while True:
            try:
                told = self._upload_once(name, descriptor, size, part_size)
                break
            except _UploadGone:
                if tries == _UPLOADS:
                    raise
                tries += 1
        self._check(name, descriptor, size, told)

    def _md5(self, descriptor: int, size: int) -> str | None:
        """Returns what S3 should tell as the ETag of a file that was put by `upload`."""
        part_size = _part_size(size)
        begins = range(0, max(size, 1), part_size)
        return _etag([_md5(os.pread(descriptor, part_size, begin)) for begin in begins])

    def _upload_once(self, name: str, descriptor: int, size: int, part_size: int) -> str:
        """Returns what S3 should tell as the object's ETag."""
        key = self._key(name)
        if size <= part_size:
            body = os.pread(descriptor, size, 0)
            self._call("put_object", **key, Body=body)
            return _etag([_md5(body)])
        upload = {**key, "UploadId": self._call("create_multipart_upload", **key)["UploadId"]}
        try:
            return self._upload_parts(name, upload, descriptor, size, part_size)
        except BaseException:
            # What cannot be ended now is ended by the next start, or by a rule of the bucket.
            with contextlib.suppress(Exception):
                self.fs.call_s3("abort_multipart_upload", **upload)
            raise

    def _upload_parts(
        self, name: str, upload: dict[str, str], descriptor: int, size: int, part_size: int
    ) -> str:
        parts: dict[int, tuple[str, bytes]] = {}

        def one(begin: int) -> None:
            body = os.pread(descriptor, part_size, begin)
            number = begin // part_size + 1
            try:
                answer = self._call("upload_part", **upload, PartNumber=number, Body=body)
            except FileNotFoundError as error:
                raise _UploadGone(errno.EIO, str(error.strerror)) from None
            parts[number] = answer["ETag"], _md5(body)

        in_pieces(one, size, part_size)
        told = [{"PartNumber": number, "ETag": parts[number][0]} for number in sorted(parts)]
        etag = _etag([parts[number][1] for number in sorted(parts)])
        try:
            self._call("complete_multipart_upload", **upload, MultipartUpload={"Parts": told})
        except FileNotFoundError as error:
            # The first answer may have been lost, and this be the second try.
            if not self._has(name, etag):
                raise _UploadGone(errno.EIO, str(error.strerror)) from None
        return etag

    def _has(self, name: str, etag: str) -> bool:
        try:
            return self.head(name).md5 == etag
        except FileNotFoundError:
            return False

    def _call(self, method: str, **arguments: Any) -> Any:
        return self.ask("writing to", lambda: self.fs.call_s3(method, **arguments))

    def end_uploads(self) -> int:
        """Ends what killed processes have begun to put and not finished; returns how many."""
        bucket, prefix, _ = self.fs.split_path(f"{self.root}/x")
        prefix = prefix.removesuffix("x")

        def ask() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = []
            marker: dict[str, str] = {}
            while True:
                answer = self.fs.call_s3(
                    "list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker
                )
                found += answer.get("Uploads", ())
                if not answer.get("IsTruncated"):
                    return found
                marker = {
                    "KeyMarker": answer["NextKeyMarker"],
                    "UploadIdMarker": answer["NextUploadIdMarker"],
                }

        left = self.ask("listing uploads to", ask)
        for one in left:
            with contextlib.suppress(FileNotFoundError):
                self._call(
                    "abort_multipart_upload",
                    Bucket=bucket,
                    Key=one["Key"],
                    UploadId=one["UploadId"],
                )
        return len(left)


def _part_size(size: int) -> int:
    """Returns in parts of how many bytes a file is put."""
    return max(PIECE, -(-size // _MOST_PARTS))


def _etag(parts: list[bytes]) -> str:
    """Returns what S3 tells of an object, by the md5 of each of its parts."""
    return parts[0].hex() if len(parts) == 1 else f"{_md5(b''.join(parts)).hex()}-{len(parts)}"


def _md5(data: bytes) -> bytes:
    # What S3 makes its ETag of, and no secret.
    return hashlib.md5(data, usedforsecurity=False).digest()


def _code(error: BaseException) -> str:
    """Returns what S3 itself has called an error."""
    response: Any = getattr(error.__cause__, "response", None)
    return str(response["Error"].get("Code", "")) if response else ""
