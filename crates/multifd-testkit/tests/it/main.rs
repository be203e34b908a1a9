//! Tests of the kit itself with real QEMUs: what it reports about migrations is right, and it leaves nothing behind.

#[cfg(test)]
mod guest;
#[cfg(test)]
mod migration;
#[cfg(test)]
mod orphans;
