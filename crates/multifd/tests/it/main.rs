//! Tests of the engine with both ends over links in memory.

#[cfg(test)]
mod belonging;
#[cfg(test)]
mod callbacks;
#[cfg(all(test, any(feature = "_codec", feature = "tls")))]
mod changing;
#[cfg(test)]
#[cfg(feature = "_codec")]
mod compression;
#[cfg(test)]
mod converge;
#[cfg(test)]
mod copies;
#[cfg(test)]
mod crowd;
#[cfg(test)]
mod dead_peers;
#[cfg(test)]
mod descriptors;
#[cfg(test)]
mod events;
#[cfg(test)]
mod extremes;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod files;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod kit;
#[cfg(test)]
mod loopback;
#[cfg(all(test, feature = "pagemap"))]
mod process;
#[cfg(test)]
mod rough_network;
#[cfg(all(test, feature = "serde"))]
mod settings;
#[cfg(test)]
mod shared_memory;
#[cfg(test)]
mod signals;
#[cfg(all(test, feature = "tls"))]
mod tls;
#[cfg(all(test, feature = "tls"))]
mod tls_split;
#[cfg(test)]
mod transports;
#[cfg(test)]
mod zero_copy;
mod zero_pages;
