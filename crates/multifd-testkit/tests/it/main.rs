//! The kit's own promises, kept with real QEMUs: what it tells about migrations can be believed.

#[cfg(test)]
mod guest;
#[cfg(test)]
mod migration;
