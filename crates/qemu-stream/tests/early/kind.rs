//! Kinds of channels and of memory: huge pages at the destination, TLS over all connections, compression.

use std::{fmt, fs::File, path::Path, rc::Rc, sync::Arc};

use multifd::{
    SendOptions,
    channel::{
        Connect, Listen, Listener,
        tls::{ClientCredentials, ServerCredentials, TlsConnector, TlsListener},
    },
    ram::{Access, BlockName, Mapping, RamBlocks},
};
use multifd_testkit::{HugePages, certificates};
use qemu_stream::{outgoing::postcopy::PostcopyOptions, source::SourceOptions};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::{
    machine::{BLOCKS, memory_of},
    network::Network,
};

#[derive(Clone, Default)]
pub(crate) struct Kind {
    tls: Option<(ClientCredentials, ServerCredentials)>,
    method: Option<&'static str>,
    huge: Option<Rc<HugePages>>,
    preempt: bool,
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tls, method, huge, preempt } = self;
        write!(f, "tls {}, {method:?}, huge {}, preempt {preempt}", tls.is_some(), huge.is_some())
    }
}

impl Kind {
    /// TLS over all connections, with credentials in this folder.
    pub(crate) fn tls(self, folder: &Path) -> Self {
        // They belong together: new ones would replace those of another kind.
        if !folder.join("ca-cert.pem").exists() {
            certificates::write_both(folder).expect("certificates");
        }
        let client = ClientCredentials::load(folder, "127.0.0.1").expect("credentials");
        let server = ServerCredentials::load(folder, Vec::new()).expect("credentials");
        Self { tls: Some((client, server)), ..self }
    }

    pub(crate) fn compressed(self, method: &'static str) -> Self {
        Self { method: Some(method), ..self }
    }

    /// Requested pages have a connection of their own, if there are no channels.
    pub(crate) fn preempt(self, on: bool) -> Self {
        Self { preempt: on, ..self }
    }

    /// Block `ram` is in huge pages at the destination. `None` if this system does not provide them.
    pub(crate) fn huge(self) -> Option<Self> {
        let pages = (BLOCKS[0].1 << 12) / HugePages::BYTES;
        let huge = Some(Rc::new(HugePages::reserve(pages)?));
        Some(Self { huge, ..self })
    }

    pub(crate) fn listener(&self, listener: Listener) -> Box<dyn Listen> {
        match &self.tls {
            Some((_, server)) => Box::new(TlsListener::new(Box::new(listener), server.clone())),
            None => Box::new(listener),
        }
    }

    pub(crate) fn connector(&self, network: &Network) -> Arc<dyn Connect> {
        self.over(Arc::new(network.clone()))
    }

    pub(crate) fn over(&self, network: Arc<dyn Connect>) -> Arc<dyn Connect> {
        match &self.tls {
            Some((client, _)) => Arc::new(TlsConnector::new(network, client.clone())),
            None => network,
        }
    }

    pub(crate) fn source(
        &self,
        options: SourceOptions,
        mut postcopy: PostcopyOptions,
        channels: u8,
    ) -> SourceOptions {
        if self.huge.is_some() {
            postcopy = postcopy.block_page_size(BlockName::new("ram").expect("a name"), HugePages::BYTES);
        }
        let options = options.postcopy(postcopy.preempt(self.preempt && channels == 0));
        match self.method.filter(|_| channels > 0) {
            Some(method) => {
                options.send(SendOptions::new().method(method.parse().expect("built in"))).channels(channels)
            }
            None => options,
        }
    }

    /// What makes the memory of a destination.
    pub(crate) fn memory(&self) -> impl FnOnce() -> RamBlocks + Send + 'static {
        let is_huge = self.huge.is_some();
        move || {
            memory_of(&|name, length| {
                if name != "ram" || !is_huge {
                    return Mapping::anonymous(length).expect("memory");
                }
                let flags = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB | MemfdFlags::CLOEXEC;
                let file = File::from(memfd_create("ram", flags).expect("a file"));
                file.set_len(length).expect("a length");
                Mapping::of_file(&file, 0, length, Access::ReadWrite).expect("huge pages")
            })
        }
    }
}
