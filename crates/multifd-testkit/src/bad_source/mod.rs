//! A source that misbehaves on demand.
//!
//! ```text
//! Shape ─▶ Script::whole ─▶ steps of a correct migration ─ patch, cut, insert, drop, stall … ─▶ play ─▶ Heard
//! ```
//!
//! A [`Script`] is a whole migration as a sequence of [`Step`]s, each on one connection. Its bytes are made here only
//! from the protocol's description. A test changes the steps, and [`Script::play`] plays them to a destination over
//! real sockets, in the caller's thread: a migration this small never fills a socket. A connection that no step closes
//! stays open until [`Heard`] is dropped, so a destination that expects more bytes waits.

mod bytes;
mod play;

pub use bytes::{BLOCKS, DEVICE, HEAD, PAGE, packet, page_of, sync};
pub use play::{Heard, Target};

/// A connection of the migration, or one that does not belong to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum On {
    /// The main stream.
    Main,
    /// The channel at this position in the script. This is its id unless the script changes it.
    Channel(u8),
    /// A foreign connection.
    Stranger(u16),
}

/// An action on a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// It is opened.
    Connect,
    /// Bytes are written, all at once.
    Send(Vec<u8>),
    /// Bytes are written one by one, each with a separate call.
    Dribble(Vec<u8>),
    /// Its sending half is closed.
    Close,
    /// It is reset: unread bytes are lost at both ends.
    Reset,
    /// The source waits until the destination has sent this byte string on the connection, or closed it.
    Hear(Vec<u8>),
}

/// One action of a source. Tests find it by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// `connect`, `initial`, `header`, `commands`, `start`, `pages`, `sync`, `part`, `end`, `devices`, `shut`, `close`.
    pub name: &'static str,
    /// The connection on which it is done.
    pub on: On,
    /// The action.
    pub act: Act,
}

/// The shape of a migration.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// The number of channels, from 1.
    pub channels: u8,
    /// Whether the source waits for the destination's confirmation.
    pub return_path: bool,
    /// Whether FLUSH records mark the sync points; otherwise every section's end does.
    pub round: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self { channels: 2, return_path: true, round: true }
    }
}

/// A sequence of steps.
#[derive(Clone, Debug)]
pub struct Script {
    /// The steps, in the order in which they are done.
    pub steps: Vec<Step>,
}

impl Script {
    /// A correct migration: all of the first block, in one pass while the guest runs and one afterwards.
    pub fn whole(shape: Shape) -> Self {
        let Shape { channels, return_path, round } = shape;
        let mut script = Self { steps: Vec::new() };
        let mut put = |name, on, act| script.steps.push(Step { name, on, act });
        put("connect", On::Main, Act::Connect);
        for id in 0..channels {
            put("connect", On::Channel(id), Act::Connect);
            put("initial", On::Channel(id), Act::Send(bytes::initial(id)));
        }
        let all_sync = |put: &mut dyn FnMut(&'static str, On, Act)| {
            for id in 0..channels {
                put("sync", On::Channel(id), Act::Send(sync()));
            }
        };
        put("header", On::Main, Act::Send(bytes::header()));
        if return_path {
            put("commands", On::Main, Act::Send(bytes::return_path()));
        }
        all_sync(&mut put);
        put("start", On::Main, Act::Send(bytes::start(round)));
        for id in 0..channels {
            let pages: Vec<u64> =
                (0..16).filter(|page| page % u64::from(channels) == u64::from(id)).collect();
            put("pages", On::Channel(id), Act::Send(packet("pc.ram", &pages, 1)));
        }
        all_sync(&mut put);
        put("part", On::Main, Act::Send(bytes::part(round)));
        put("pages", On::Channel(0), Act::Send(packet("pc.ram", &[3], 2)));
        all_sync(&mut put);
        put("end", On::Main, Act::Send(bytes::end(round)));
        put("devices", On::Main, Act::Send(bytes::devices()));
        if return_path {
            put("shut", On::Main, Act::Hear(vec![0, 1, 0, 4, 0, 0, 0, 0]));
        }
        for id in 0..channels {
            put("close", On::Channel(id), Act::Close);
        }
        put("close", On::Main, Act::Close);
        script
    }

    /// The position of the `n`-th step of a name on a connection, from 0.
    ///
    /// # Panics
    /// If there is none.
    pub fn find(&self, on: On, name: &str, n: usize) -> usize {
        let found =
            self.steps.iter().enumerate().filter(|(_, step)| step.on == on && step.name == name).nth(n);
        found.unwrap_or_else(|| panic!("no step {name:?} number {n} on {on:?}")).0
    }

    /// Overwrites bytes that a step sends.
    ///
    /// # Panics
    /// If it sends nothing, or fewer bytes.
    #[must_use]
    pub fn patch(mut self, on: On, name: &str, n: usize, at: usize, new: &[u8]) -> Self {
        self.bytes_of(on, name, n)[at..at + new.len()].copy_from_slice(new);
        self
    }

    /// Replaces what a step does.
    #[must_use]
    pub fn replace(mut self, on: On, name: &str, n: usize, act: Act) -> Self {
        let at = self.find(on, name, n);
        self.steps[at].act = act;
        self
    }

    /// Makes a step send only its first bytes, then does `act` on the connection and removes its later steps.
    ///
    /// # Panics
    /// If it sends nothing.
    #[must_use]
    pub fn cut(mut self, on: On, name: &str, n: usize, keep: usize, act: Option<Act>) -> Self {
        self.bytes_of(on, name, n).truncate(keep);
        let at = self.find(on, name, n) + 1;
        let rest = self.steps.split_off(at);
        self.steps.extend(act.map(|act| Step { name: "fault", on, act }));
        self.steps.extend(rest.into_iter().filter(|step| step.on != on));
        self
    }

    /// Leaves a step out.
    #[must_use]
    pub fn drop(mut self, on: On, name: &str, n: usize) -> Self {
        let at = self.find(on, name, n);
        self.steps.remove(at);
        self
    }

    /// Leaves a whole connection out.
    #[must_use]
    pub fn without(mut self, on: On) -> Self {
        self.steps.retain(|step| step.on != on);
        self
    }

    /// Inserts steps before a step.
    #[must_use]
    pub fn before(
        mut self,
        on: On,
        name: &str,
        n: usize,
        steps: impl IntoIterator<Item = (On, Act)>,
    ) -> Self {
        let at = self.find(on, name, n);
        let steps = steps.into_iter().map(|(on, act)| Step { name: "fault", on, act });
        self.steps.splice(at..at, steps.collect::<Vec<_>>());
        self
    }

    /// Makes every byte of a connection a separate write.
    #[must_use]
    pub fn dribbled(mut self, on: On) -> Self {
        for step in self.steps.iter_mut().filter(|step| step.on == on) {
            if let Act::Send(bytes) = &mut step.act {
                step.act = Act::Dribble(std::mem::take(bytes));
            }
        }
        self
    }

    /// Moves all steps of a connection before the others.
    #[must_use]
    pub fn first(mut self, on: impl Fn(On) -> bool, until: &str) -> Self {
        let end = self.steps.iter().position(|step| step.name == until).unwrap_or(self.steps.len());
        self.steps[..end].sort_by_key(|step| !on(step.on));
        self
    }

    fn bytes_of(&mut self, on: On, name: &str, n: usize) -> &mut Vec<u8> {
        let at = self.find(on, name, n);
        match &mut self.steps[at].act {
            Act::Send(bytes) | Act::Dribble(bytes) => bytes,
            other => panic!("{name:?} sends nothing: {other:?}"),
        }
    }
}
