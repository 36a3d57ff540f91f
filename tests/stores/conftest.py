"""Stores of several kinds, for the tests of this folder."""

from s3_server import proxy, s3_address, s3_url, url

__all__ = ["proxy", "s3_address", "s3_url", "url"]
