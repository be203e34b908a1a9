//! Tests of page faults that are delivered to this process, with the kernel's own faults.

#![cfg(all(test, feature = "fault"))]

mod beside;
mod copier;
mod handover;
mod kit;
#[cfg(feature = "kvm")]
mod kvm;
mod layer;
mod pager;
mod push;
mod refusals;
