"""The command line: `kvpleat generate`, `chat`, `policies`, `explain`, `models`."""

from kvpleat.cli.app import app, main

__all__ = ["app", "main"]
