//! Real QEMUs at both ends, the program between them.

mod architectures;
mod chains;
mod compression;
mod differing;
mod direct_io;
mod files;
mod foreign;
mod interrupted;
mod journey;
mod many;
mod matrix;
mod odd;
mod operated;
mod owners;
mod parameters;
mod peers;
mod postcopy;
mod postcopy_soak;
mod refused;
mod snapshots;
mod switched;
mod tls;
mod transports;
mod uuids;
mod zero_copy;
mod zero_pages;
