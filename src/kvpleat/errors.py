"""Every error kvpleat raises on purpose. Each message says the value, the consequence and the remedy.

KvpleatError
├── OptionError        (ValueError)       an argument, option or prompt cannot be used as given
├── UnsupportedError   (ValueError)       a model, family or transformers feature that kvpleat does not serve
├── ModelError         (OSError)          a model cannot be found or loaded
├── AttachError        (RuntimeError)     attach, detach or nesting in the wrong order
├── CacheError         (RuntimeError)     a cache is used in a way its state does not allow
├── CacheFileError     (ValueError)       a saved cache is damaged, truncated, foreign, or could not be written
├── OutOfPagesError    (MemoryError)      the page pool cannot grow any further
├── OutOfMemoryError   (MemoryError)      a device has too little memory for what was asked of it
├── EngineError        (RuntimeError)     the engine has failed or was closed, and with it the requests it had
├── NumericsError      (ArithmeticError)  NaN or infinite values reached a policy or the output
├── PeerError          (RuntimeError)     another library that is measured beside kvpleat failed
└── JudgeError         (RuntimeError)     a measurement failed its own check, so its figures are not given out
"""


class KvpleatError(Exception):
    """Base class: catch this to catch everything that kvpleat raises on purpose."""


class OptionError(KvpleatError, ValueError):
    """An argument, option or prompt cannot be used as given."""


class UnsupportedError(KvpleatError, ValueError):
    """A model, family or transformers feature that kvpleat does not serve."""


class ModelError(KvpleatError, OSError):
    """A model cannot be found or loaded."""


class AttachError(KvpleatError, RuntimeError):
    """Attach, detach or nesting in the wrong order."""


class CacheError(KvpleatError, RuntimeError):
    """A cache is used in a way its state does not allow."""


class CacheFileError(KvpleatError, ValueError):
    """A saved cache is damaged, truncated or foreign, or could not be written."""


class OutOfPagesError(KvpleatError, MemoryError):
    """The page pool cannot grow any further."""


class OutOfMemoryError(KvpleatError, MemoryError):
    """A device has too little memory for what was asked of it."""


class EngineError(KvpleatError, RuntimeError):
    """The engine has failed or was closed, and with it the requests it had."""


class NumericsError(KvpleatError, ArithmeticError):
    """NaN or infinite values reached a policy or the output."""


class PeerError(KvpleatError, RuntimeError):
    """Another library that is measured beside kvpleat failed."""


class JudgeError(KvpleatError, RuntimeError):
    """A measurement failed its own check, so its figures are not given out."""
