//! The two drivers against each other and against streams made to hurt.

#[cfg(test)]
mod file_size;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod kit;
#[cfg(test)]
mod loopback;
#[cfg(test)]
mod odd;
#[cfg(test)]
mod return_path;
#[cfg(test)]
mod snapshots;
