//! Tests of the two drivers together, and with hostile streams.

#[cfg(test)]
mod chains;
#[cfg(test)]
mod events;
#[cfg(test)]
mod extremes;
#[cfg(test)]
mod file_size;
#[cfg(test)]
mod hand_over;
#[cfg(test)]
mod hops;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod kit;
#[cfg(test)]
mod loopback;
#[cfg(test)]
mod odd;
#[cfg(test)]
mod postcopy;
#[cfg(test)]
mod postcopy_resumed;
#[cfg(test)]
mod postcopy_source;
#[cfg(test)]
mod reasons;
#[cfg(test)]
mod return_path;
#[cfg(test)]
mod silent;
#[cfg(test)]
mod snapshots;

// The manual's own code.
#[cfg(test)]
#[expect(unreachable_pub, reason = "the manual shows it so")]
#[path = "../../src/guide/code/arrive.rs"]
mod arrive;
#[cfg(test)]
#[expect(unreachable_pub, reason = "the manual shows it so")]
#[path = "../../src/guide/code/leave.rs"]
mod leave;
#[cfg(test)]
#[expect(unreachable_pub, reason = "the manual shows it so")]
#[path = "../../src/guide/code/machine.rs"]
mod machine;
#[cfg(test)]
#[expect(unreachable_pub, reason = "the manual shows it so")]
#[path = "../../src/guide/code/snapshot.rs"]
mod snapshot;
