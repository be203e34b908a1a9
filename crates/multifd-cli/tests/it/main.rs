//! The program as users run it: a process, started with arguments, at either end of real migrations.
#![expect(clippy::disallowed_methods, reason = "a test shows its own paths")]

#[cfg(test)]
mod interop;
#[cfg(test)]
mod kit;
#[cfg(test)]
mod metrics;
#[cfg(test)]
mod program;
#[cfg(test)]
mod table;
