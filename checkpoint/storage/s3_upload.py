"""An object of an S3 store, uploaded in parts that travel in parallel.

s3fs' own file uploads one part after the other. Invariant: the object appears with the last call, whole and compared
with what was sent; an upload that fails is aborted, so that no part of it is kept and charged for.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

from ckptd.checkpoint.storage.retrying import Backoff
from ckptd.checkpoint.storage.sink import Bytes
from ckptd.protocol.errors import ObjectStoreFailed, WrongUpload

# S3 takes 10,000 parts of 5 MiB to 5 GiB. Source: AWS, "Amazon S3 multipart upload limits".
_MOST_PARTS: Final = 10_000
_PARTS_AT_A_TIME: Final = 8
_MD5: Final = re.compile(r"[0-9a-f]{32}")


class S3Sink:
    """One new object; at most eight parts and one in the making are in memory.

    Args:
        fs: An s3fs file system.
        url: Where it goes.
        part_bytes: Size of a part; more if the object would have too many.
        expected_bytes: About the object's size.
        backoff: How calls are made again.
    """

    def __init__(self, fs: Any, url: str, *, part_bytes: int, expected_bytes: int, backoff: Backoff) -> None:
        self._fs, self._url, self._backoff = fs, url, backoff
        self._bucket, self._key, _ = fs.split_path(url)
        self._part_bytes = max(part_bytes, -(-expected_bytes // (_MOST_PARTS * 9 // 10)))
        self._part = bytearray()
        self._sent_bytes = 0
        self._upload_id: str | None = None
        self._room = threading.Semaphore(_PARTS_AT_A_TIME)
        self._pool: ThreadPoolExecutor | None = None
        self._parts: list[Future[tuple[str, bytes]]] = []
        self._appeared = False

    def write(self, data: Bytes) -> None:
        """Append bytes; full parts are on their way when this returns. Raises a StorageError of an earlier part."""
        view = memoryview(data)
        while view:
            count = min(len(view), self._part_bytes - len(self._part))
            self._part += view[:count]
            view = view[count:]
            if len(self._part) == self._part_bytes:
                self._send()

    def close(self) -> None:
        """Finish the object and compare it with what was sent. Raises ObjectStoreFailed, WrongUpload."""
        if self._upload_id is None:
            self._put()
        else:
            if self._part:
                self._send()
            self._complete()
        self._end_pool()
        found = self._head().get("size")
        if found != self._sent_bytes:
            raise WrongUpload(self._url, f"{self._sent_bytes} bytes", f"{found} bytes")

    def abort(self) -> None:
        """Abort the upload, and remove the object if it is there already."""
        self.abort_upload()
        if self._appeared:
            self._request("delete", "delete_object")

    def abort_upload(self) -> None:
        """Abort the upload, once no part is on its way any more; an object that is there stays."""
        self._end_pool()
        if self._upload_id is not None:
            upload_id, self._upload_id = self._upload_id, None
            self._request("abort", "abort_multipart_upload", UploadId=upload_id)

    def _put(self) -> None:
        data = bytes(self._part)
        self._sent_bytes = len(data)
        self._appeared = True  # from here on it may be there, whatever the answer
        answer = self._request("put", "put_object", Body=data)
        self._compare(answer, _md5(data).hex())

    def _send(self) -> None:
        if self._upload_id is None or self._pool is None:
            self._upload_id = self._request("create", "create_multipart_upload")["UploadId"]
            self._pool = ThreadPoolExecutor(_PARTS_AT_A_TIME, thread_name_prefix="ckptd-upload")
        self._room.acquire()
        for part in self._parts:
            if part.done():
                part.result()  # a part that failed ends the object: no use in sending more
        data, self._part = bytes(self._part), bytearray()
        self._sent_bytes += len(data)
        self._parts.append(self._pool.submit(self._upload, len(self._parts) + 1, data))

    def _upload(self, number: int, data: bytes) -> tuple[str, bytes]:
        try:
            digest = _md5(data)
            place = {"PartNumber": number, "UploadId": self._upload_id}
            answer = self._request(f"part {number}", "upload_part", Body=data, **place)
            self._compare(answer, digest.hex())
            return answer["ETag"], digest
        finally:
            self._room.release()

    def _complete(self) -> None:
        sent = [part.result() for part in self._parts]
        parts = {"Parts": [{"PartNumber": number, "ETag": etag} for number, (etag, _) in enumerate(sent, 1)]}
        tag = f"{_md5(b''.join(digest for _, digest in sent)).hex()}-{len(sent)}"
        self._appeared = True
        try:
            answer = self._request(
                "complete", "complete_multipart_upload", UploadId=self._upload_id, MultipartUpload=parts
            )
        except ObjectStoreFailed:
            # Made again after an answer that was lost, the call finds no such upload any more.
            answer = self._head()
            if str(answer.get("ETag")).strip('"') != tag:
                raise
        self._upload_id = None
        self._compare(answer, tag)

    def _compare(self, answer: Mapping[str, Any], expected: str) -> None:
        """Compare the tag of what the store has received with what was sent, where the tag is a checksum."""
        encrypted = answer.get("ServerSideEncryption") not in {None, "AES256"} or "SSECustomerAlgorithm" in answer
        found = str(answer.get("ETag", "")).strip('"')
        if encrypted or not _MD5.fullmatch(found.partition("-")[0]):
            return  # with keys of the customer's, or in some other stores, a tag is no MD5
        if found != expected:
            raise WrongUpload(self._url, f"MD5 {expected}", f"MD5 {found}")

    def _head(self) -> Mapping[str, Any]:
        def head() -> Mapping[str, Any]:
            try:
                found: Mapping[str, Any] = self._fs.info(self._url, refresh=True)
            except FileNotFoundError:
                return {}
            return found

        return self._backoff.call("head", self._url, head)

    def _request(self, what: str, method: str, **fields: Any) -> Any:
        place = {"Bucket": self._bucket, "Key": self._key}
        try:
            return self._backoff.call(what, self._url, lambda: self._fs.call_s3(method, **place, **fields))
        except FileNotFoundError as error:  # no such bucket, or no such upload
            raise ObjectStoreFailed(what, self._url, str(error)) from error

    def _end_pool(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()
