//! A real QEMU guest goes into a file and out of it into another QEMU, and runs on without a wrong byte.
//!
//! Source and destination are real QEMUs; between them is the program, as a user starts it. The guest rewrites
//! its memory all the time, checks each page before it does, and says so on its serial line.

#[cfg(test)]
mod kit;
#[cfg(test)]
mod matrix;
#[cfg(test)]
mod ways;
