"""Every error that lmcache raises on purpose.

    LMCacheError
    ├── ConfigError (ValueError)        a config file, override or component option is wrong
    ├── UnsupportedLayoutError (NotImplementedError)  the engine stores KV in a way we cannot move safely
    ├── BlendError (ValueError)          a model, a prompt or its reused KV cannot be blended
    ├── KernelArgumentError (ValueError)  a tensor of the wrong dtype, device, stride or shape
    ├── BufferStateError (RuntimeError) a pool handle used after, or released more than once
    ├── StorageError (OSError)          a tier could not do what was asked; the manager turns it into a miss
    │   ├── CorruptChunkError           the bytes read are not the chunk that was asked for
    │   │   └── OddFileError            what has a file's name is no regular file with one link
    │   └── ProtocolError               the other side of a connection talks nonsense; it is closed
    ├── LeaseExpiredError (RuntimeError) the chunks of a lookup are no longer held
    ├── AdapterChangedError (RuntimeError) an adapter is not the one that its files were when it was asked for
    ├── WeightsChangedError (RuntimeError)  the model computes with other weights than its KV is named after
    └── ClosedError (RuntimeError)      use after close()

A miss is never an exception: lookups and reads return how much they found.
"""

from __future__ import annotations


class LMCacheError(Exception):
    """Base of the tree."""


class ConfigError(LMCacheError, ValueError):
    """A config file, override or component option is wrong."""


class UnsupportedLayoutError(LMCacheError, NotImplementedError):
    """The engine stores KV in a way that cannot be moved safely; raised at start, never later."""


class BlendError(LMCacheError, ValueError):
    """A model, a prompt or its reused KV cannot be blended; raised instead of a result that is nearly right."""


class KernelArgumentError(LMCacheError, ValueError):
    """A tensor argument has the wrong dtype, device, stride or shape."""


class BufferStateError(LMCacheError, RuntimeError):
    """A pool handle was used after its release, or released twice."""


class StorageError(LMCacheError, OSError):
    """A tier could not do what was asked."""


class CorruptChunkError(StorageError):
    """The bytes read are not the chunk that was asked for."""


class OddFileError(CorruptChunkError):
    """What has the name of a file of ours is a link, a folder, a FIFO, ...: it is neither read nor written."""


class ProtocolError(StorageError):
    """What came over a connection is not what the protocol says; the connection is closed."""


class LeaseExpiredError(LMCacheError, RuntimeError):
    """The chunks of a lookup are no longer held."""


class AdapterChangedError(LMCacheError, RuntimeError):
    """The adapter that the engine has loaded is not the one that its files were when the request came."""


class WeightsChangedError(LMCacheError, RuntimeError):
    """The model computes with other weights than its KV is named after; that KV is neither stored nor used."""


class ClosedError(LMCacheError, RuntimeError):
    """Use after close()."""
