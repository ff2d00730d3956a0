"""The repository, in and out: a bundle goes in, a bundle comes out, whatever the source.

address.py       which addresses and refs are accepted
working_tree.py  a folder of the user's, with what is not committed yet -> bundle
pushed.py        what of a folder a server elsewhere can fetch
uploaded.py      a bundle that somebody elsewhere has sent
source.py        what goes in with a task at its submit
config.py        what a repository says of itself in `.cloudagent.toml`
manifests.py     what its set-up depends on
remote.py        an https or ssh address -> bundle, through a cache
sandbox.py       bundle -> the agent's working tree -> bundle; verify
inside.py        the part of that which runs in the sandbox
bundles.py       a bundle's header, and the quarantine in which a hostile one is looked at
"""

from cloudagent_queue.repository.address import check_address, check_ref, is_remote, upload_in
from cloudagent_queue.repository.bundles import ChangedFile, Changes, Quarantine, inspect, with_ref
from cloudagent_queue.repository.config import RepositoryConfig, read_config
from cloudagent_queue.repository.manifests import setup_key
from cloudagent_queue.repository.pushed import Pushed, find_pushed
from cloudagent_queue.repository.remote import Fetched, fetch
from cloudagent_queue.repository.sandbox import (
    OUTPUT_LIMIT,
    changed_files,
    check_out,
    checkpoint,
    collect,
    restore,
    run_setup,
    verify,
)
from cloudagent_queue.repository.source import Source, read_source, warnings_of
from cloudagent_queue.repository.uploaded import Uploaded, import_upload
from cloudagent_queue.repository.working_tree import LocalRepository, WorkingTree, bundle_working_tree, origin_of

__all__ = [
    "OUTPUT_LIMIT",
    "ChangedFile",
    "Changes",
    "Fetched",
    "LocalRepository",
    "Pushed",
    "Quarantine",
    "RepositoryConfig",
    "Source",
    "Uploaded",
    "WorkingTree",
    "bundle_working_tree",
    "changed_files",
    "check_address",
    "check_out",
    "check_ref",
    "checkpoint",
    "collect",
    "fetch",
    "find_pushed",
    "import_upload",
    "inspect",
    "is_remote",
    "origin_of",
    "read_config",
    "read_source",
    "restore",
    "run_setup",
    "setup_key",
    "upload_in",
    "verify",
    "warnings_of",
    "with_ref",
]
