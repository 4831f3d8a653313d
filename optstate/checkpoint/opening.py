def open_checkpoint(path, *, key=None, names=None, optimizer=None):
    import os
    from optstate.checkpoint.container import read_header
    from optstate.checkpoint.document import document_of
    from optstate.checkpoint.checkpoint import Checkpoint
    from optstate.checkpoint.stored import stored_entry

    path = os.fspath(path)
    h = read_header(path)
    d = document_of(h)
    return Checkpoint(path, "optstate", "declared", d, {e.name: stored_entry(path, e) for e in h.tensors}, (path,))
