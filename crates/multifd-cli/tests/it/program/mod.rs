//! Tests of the command line: results on standard output, messages on standard error, exit codes, no incomplete files
//! left.

mod broken_off;
mod containers;
mod crowd;
mod demo;
mod direct_io;
mod disks;
mod escapes;
mod extract;
mod files;
mod inspect;
mod limits;
mod many;
mod memory;
mod pages;
mod parameters;
mod progress;
mod proxied;
mod receive;
mod security;
mod send;
mod stalls;
mod streams;
mod targets;
mod usage;
mod zero_copy;
