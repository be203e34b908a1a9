//! Real virtual machines of `/dev/kvm`, moved between processes.

#[cfg(test)]
mod broken;
#[cfg(test)]
mod kit;
#[cfg(test)]
mod local;
#[cfg(test)]
mod migration;
#[cfg(test)]
mod postcopy;
#[cfg(test)]
mod shaped;
#[cfg(test)]
mod snapshot;
