//! Links that count the engine's calls.

use std::{
    io,
    ops::Range,
    sync::{Arc, Mutex},
    time::Duration,
};

use multifd::{
    channel::{Connect, Context, Host, Link, Listen, PeerSignal, Wake},
    ram::{BlockIndex, PageIndex, Part, PartMut, RamBlocks},
};

/// The calls on one connection in one direction, or the sum of several.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Count {
    pub(crate) calls: u64,
    /// Parts of these calls.
    pub(crate) vectors: u64,
    /// Bytes from or to RAM itself.
    pub(crate) in_place: u64,
    /// Bytes from or to anywhere else.
    pub(crate) elsewhere: u64,
}

/// The counts of one side, one per connection in the order in which they were opened.
pub(crate) struct Counts {
    ram: Range<usize>,
    links: Mutex<Vec<Count>>,
}

impl Counts {
    /// The counts of a side with this RAM.
    pub(crate) fn of(blocks: &RamBlocks) -> Arc<Self> {
        let block = blocks.get(BlockIndex(0)).expect("there");
        let slice = block.slice(PageIndex(0), block.pages()).expect("mapped");
        let start = slice.as_ptr().addr();
        Arc::new(Self { ram: start..start + slice.len(), links: Mutex::default() })
    }

    /// The sum over all but the first, which is main.
    pub(crate) fn channels(&self) -> Count {
        self.links.lock().expect("whole")[1..].iter().fold(Count::default(), |sum, link| Count {
            calls: sum.calls + link.calls,
            vectors: sum.vectors + link.vectors,
            in_place: sum.in_place + link.in_place,
            elsewhere: sum.elsewhere + link.elsewhere,
        })
    }

    fn wrap(self: &Arc<Self>, inner: Box<dyn Link>) -> Box<dyn Link> {
        let mut links = self.links.lock().expect("whole");
        links.push(Count::default());
        Box::new(CountedLink { inner, counts: self.clone(), number: links.len() - 1, unsent: 0, left: 0 })
    }

    fn call(&self, number: usize, vectors: usize) {
        let count = &mut self.links.lock().expect("whole")[number];
        count.calls += 1;
        count.vectors += vectors as u64;
    }

    fn moved(&self, number: usize, places: impl Iterator<Item = (usize, usize)>, mut moved: usize) {
        let count = &mut self.links.lock().expect("whole")[number];
        for (start, len) in places {
            let len = len.min(moved);
            moved -= len;
            let kind = if self.ram.contains(&start) { &mut count.in_place } else { &mut count.elsewhere };
            *kind += len as u64;
        }
    }
}

struct CountedLink {
    inner: Box<dyn Link>,
    counts: Arc<Counts>,
    number: usize,
    /// The number of bytes that the last call to send did not accept.
    unsent: usize,
    /// The number of bytes that the last call to receive asked for and did not get. A call for the same number asks for
    /// them again, and is counted with it: how often that happens depends on the system.
    left: usize,
}

impl Link for CountedLink {
    fn is_readable(&mut self) -> io::Result<bool> {
        self.inner.is_readable()
    }

    fn peer_signal(&self) -> io::Result<Option<PeerSignal>> {
        self.inner.peer_signal()
    }

    fn host(&self) -> Option<Host> {
        self.inner.host()
    }

    fn finish(&mut self) -> io::Result<()> {
        self.inner.finish()
    }

    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        let asked: usize = parts.iter().map(Part::len).sum();
        if self.unsent != asked {
            self.counts.call(self.number, parts.len());
        }
        let sent = self.inner.send(parts)?;
        self.unsent = asked - sent;
        let places = parts.iter().map(|part| (part.as_ptr().addr(), part.len()));
        self.counts.moved(self.number, places, sent);
        Ok(sent)
    }

    fn recv(&mut self, parts: &mut [PartMut<'_>]) -> io::Result<usize> {
        let asked: usize = parts.iter().map(PartMut::len).sum();
        if self.left != asked {
            self.counts.call(self.number, parts.len());
        }
        let received = self.inner.recv(parts)?;
        let places = parts.iter_mut().map(|part| (part.as_mut_ptr().addr(), part.len()));
        self.counts.moved(self.number, places, received);
        self.left = asked - received;
        Ok(received)
    }

    fn set_recv_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.inner.set_recv_timeout(limit)
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.inner.waker()
    }
    fn send_waker(&self) -> Arc<dyn Wake> {
        self.inner.send_waker()
    }
    fn recv_waker(&self) -> Arc<dyn Wake> {
        self.inner.recv_waker()
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }

    fn close_send(&mut self) -> io::Result<()> {
        self.inner.close_send()
    }
}

/// Opens connections that count what they send.
pub(crate) struct CountedConnector {
    inner: Arc<dyn Connect>,
    counts: Arc<Counts>,
}

impl CountedConnector {
    pub(crate) fn new(inner: Arc<dyn Connect>, counts: Arc<Counts>) -> Self {
        Self { inner, counts }
    }
}

impl Connect for CountedConnector {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        Ok(self.counts.wrap(self.inner.connect(context)?))
    }

    fn target(&self) -> String {
        self.inner.target()
    }
}

/// Accepts connections that count what they receive.
pub(crate) struct CountedListener {
    inner: Box<dyn Listen>,
    counts: Arc<Counts>,
}

impl CountedListener {
    pub(crate) fn new(inner: Box<dyn Listen>, counts: Arc<Counts>) -> Self {
        Self { inner, counts }
    }
}

impl Listen for CountedListener {
    fn accept(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        Ok(self.inner.accept(context)?.map(|link| self.counts.wrap(link)))
    }

    fn accept_waiting(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        Ok(self.inner.accept_waiting(context)?.map(|link| self.counts.wrap(link)))
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.inner.waker()
    }

    fn address(&self) -> String {
        self.inner.address()
    }
}
