//! The kit's own promises, kept with real QEMUs: what it tells about migrations can be believed, and it leaves nothing.

#[cfg(test)]
mod guest;
#[cfg(test)]
mod migration;
#[cfg(test)]
mod orphans;
