//! The program as users run it: a process, started with arguments, at either end of real migrations.

#[cfg(test)]
mod interop;
#[cfg(test)]
mod kit;
#[cfg(test)]
mod program;
#[cfg(test)]
mod table;
