//! What the command line promises: results on standard output, talk on standard error, exit codes, nothing left
//! half-made.

mod broken_off;
mod demo;
mod inspect;
mod receive;
mod send;
mod usage;
