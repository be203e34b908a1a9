//! The bound on connections that do not belong to the migration yet, and which of them is closed when there are too many.
//!
//! Anyone who can reach the listener can open connections and say nothing on them. Each takes a descriptor and a thread, so
//! their number is bounded. If a new connection were refused at the bound, one host could keep the source out for as long as
//! it likes. Instead every host has a share, and a new connection replaces the oldest silent one: of its own host when the
//! share is full, of the host with the most connections when all places are taken. When main is known, connections that
//! cannot be channels of its migration are closed first. A source says at once what its connections are, so it is not silent
//! for long enough to be the oldest.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

use super::{
    entry::{Origin, Stage, Unidentified},
    shared::{Shared, State},
};
use crate::{
    channel::{Host, Link, Wake, deadline},
    sync_types::Instant,
    wire::limits,
};

/// The connections that count together: those of one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Share {
    Ip4(Ipv4Addr),
    /// A host of IPv6 usually has all addresses of a network of 64 bits.
    Ip6([u16; 4]),
    Vsock(u32),
    /// A user of this machine, over a unix socket: processes are cheap.
    User(u32),
    /// The link does not report its host.
    Unknown,
}

impl Share {
    pub(super) fn of(host: Option<Host>) -> Self {
        match host {
            Some(Host::Ip(IpAddr::V4(address))) => Self::Ip4(address),
            Some(Host::Ip(IpAddr::V6(address))) => {
                let [a, b, c, d, ..] = address.segments();
                Self::Ip6([a, b, c, d])
            }
            Some(Host::Vsock(cid)) => Self::Vsock(cid),
            Some(Host::Process { uid, .. }) => Self::User(uid),
            None => Self::Unknown,
        }
    }
}

/// A connection outside of the migration that can be closed.
struct Candidate {
    share: Share,
    /// It has said that it is a channel, and waits for main.
    waits: bool,
    number: u64,
    /// Its pages could be missing: it may be a channel of the migration.
    missed: bool,
}

/// Counts a connection until its thread has ended and its descriptor is closed.
pub(super) struct Open(Arc<Shared>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.lock().roster.open -= 1;
        self.0.changed.notify_all();
    }
}

impl Shared {
    /// Lists a new connection and returns its number, closing another one if there are too many. `None` if the migration is
    /// over, or if closed connections do not end.
    pub(super) fn enlist(self: &Arc<Self>, link: &dyn Link) -> Option<(u64, Open)> {
        let (mut origin, wake) = (Origin::new(link, 0), link.waker());
        let end = deadline(ENDS_WITHIN);
        let mut state = self.lock();
        loop {
            if state.life.stopped {
                tracing::debug!(peer = origin.peer, "a connection after the end is dropped");
                return None;
            }
            if let Some(number) = self.surplus(&state, &origin) {
                let closed = state.close(number);
                drop(state);
                closed.inspect(|wake| wake.wake());
                state = self.lock();
                continue;
            }
            if state.roster.open < limits::CONNECTIONS {
                break;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!(peer = origin.peer, "a connection too many is dropped");
                return None;
            }
            state = self.wait_timeout(state, left);
        }
        state.roster.open += 1;
        state.roster.accepted += 1;
        let number = state.roster.accepted;
        origin.number = number;
        state.roster.unidentified.push(Unidentified { origin, wake, stage: Stage::Silent });
        Some((number, Open(self.clone())))
    }

    /// Closes silent connections because the process has no descriptors or threads left. `false` if no connection is silent: then the
    /// migration itself needs more. A connection that has just been accepted gets some time before it counts as silent.
    pub(super) fn close_silent(&self) -> bool {
        let end = deadline(SPEAKS_WITHIN);
        let mut state = self.lock();
        let before = state.roster.open;
        while state.roster.unidentified.iter().any(|entry| entry.stage == Stage::Silent) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || state.life.stopped {
                break;
            }
            state = self.wait_timeout(state, left);
        }
        let silent = state.roster.unidentified.iter().filter(|entry| entry.stage == Stage::Silent).count();
        let mut closed = Vec::new();
        for _ in 0..silent.div_ceil(2) {
            let all = self.candidates(&state).into_iter().filter(|candidate| !candidate.waits).collect();
            closed.extend(choose(all, None).and_then(|number| state.close(number)));
        }
        drop(state);
        for wake in &closed {
            wake.wake();
        }
        let end = deadline(ENDS_WITHIN);
        let mut state = self.lock();
        while !closed.is_empty() && state.roster.open >= before && !state.life.stopped {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.wait_timeout(state, left);
        }
        state.roster.open < before && !state.life.stopped
    }

    /// The connection that must make room for one from `origin`; `None` if there is room.
    fn surplus(&self, state: &State, origin: &Origin) -> Option<u64> {
        surplus(self.candidates(state), Share::of(origin.host))
    }

    fn candidates(&self, state: &State) -> Vec<Candidate> {
        let silent = state.roster.unidentified.iter().filter(|entry| entry.stage == Stage::Silent);
        let silent = silent.map(|entry| (&entry.origin, false));
        let waiting = state.roster.waiting.iter().map(|newcomer| (&newcomer.origin, true));
        let all = silent.chain(waiting).map(|(origin, waits)| {
            let (share, number) = (Share::of(origin.host), origin.number);
            Candidate { share, waits, number, missed: self.may_be_missed(state, origin) }
        });
        all.collect()
    }
}

/// The connection that must make room for one of this share; `None` if there is room.
fn surplus(mut all: Vec<Candidate>, of: Share) -> Option<u64> {
    let own = all.iter().filter(|candidate| candidate.share == of).count();
    if own >= limits::GREETINGS {
        all.retain(|candidate| candidate.share == of);
    } else if all.len() < limits::OUTSIDE {
        return None;
    }
    choose(all, Some(of))
}

/// The connection to close for one of this share, if it is known.
fn choose(mut all: Vec<Candidate>, of: Option<Share>) -> Option<u64> {
    if all.iter().any(|candidate| !candidate.missed) {
        all.retain(|candidate| !candidate.missed);
    }
    let mut sizes: BTreeMap<Share, usize> = of.map(|share| (share, 1)).into_iter().collect();
    for candidate in &all {
        *sizes.entry(candidate.share).or_insert(0) += 1;
    }
    let size = |candidate: &Candidate| sizes.get(&candidate.share).copied().unwrap_or(0);
    let most = all.iter().map(size).max()?;
    all.retain(|candidate| size(candidate) == most);
    all.iter().min_by_key(|candidate| (candidate.waits, candidate.number)).map(|candidate| candidate.number)
}

impl State {
    /// Takes connection `number` off the list and returns what shuts it down.
    fn close(&mut self, number: u64) -> Option<Arc<dyn Wake>> {
        let roster = &mut self.roster;
        roster.surplus += 1;
        let (peer, wake);
        if let Some(entry) = roster.unidentified.iter_mut().find(|entry| entry.origin.number == number) {
            entry.stage = Stage::Closed;
            (peer, wake) = (entry.origin.peer.clone(), entry.wake.clone());
        } else {
            let at = roster.waiting.iter().position(|newcomer| newcomer.origin.number == number)?;
            let newcomer = roster.waiting.remove(at);
            (peer, wake) = (newcomer.origin.peer.clone(), newcomer.wake);
            roster.lose(newcomer.origin);
        }
        // One line for each would fill the log.
        if roster.surplus.is_power_of_two() {
            tracing::warn!(
                peer,
                closed = roster.surplus,
                "too many connections that have not said what they are: the oldest one of the host with the most was closed"
            );
        }
        Some(wake)
    }

    /// Connection `number` has said what it is and is not closed to make room any more. `false` if it was closed before.
    pub(super) fn keep(&mut self, number: u64) -> bool {
        let entry = self.roster.unidentified.iter_mut().find(|entry| entry.origin.number == number);
        entry.is_none_or(|entry| {
            let open = entry.stage != Stage::Closed;
            if open {
                entry.stage = Stage::Identified;
            }
            open
        })
    }
}

/// A connection that was shut down ends at once, unless its link does not obey its waker.
const ENDS_WITHIN: Duration = Duration::from_secs(1);
/// A source sends the first bytes of a connection at once.
const SPEAKS_WITHIN: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    fn host(last: u8) -> Share {
        Share::Ip4(Ipv4Addr::new(127, 0, 0, last))
    }

    fn silent(share: Share, numbers: std::ops::Range<u64>) -> impl Iterator<Item = Candidate> {
        numbers.map(move |number| Candidate { share, waits: false, number, missed: false })
    }

    const SHARE: u64 = limits::GREETINGS as u64;
    const ALL: u64 = limits::OUTSIDE as u64;

    #[test]
    fn the_oldest_silent_connection_of_a_full_share_makes_room_for_its_own_host_only() {
        let crowd = || silent(host(2), 1..SHARE + 1).chain(silent(host(3), 0..1)).collect::<Vec<_>>();
        assert_eq!(surplus(crowd(), host(2)), Some(1));
        assert_eq!(surplus(crowd(), host(1)), None);
        let below = silent(host(2), 1..SHARE).collect();
        assert_eq!(surplus(below, host(2)), None);
    }

    #[test]
    fn when_all_places_are_taken_the_host_with_the_most_makes_room() {
        let few = 10;
        let crowd = || silent(host(1), 0..few).chain(silent(host(2), few..ALL)).collect::<Vec<_>>();
        // Another host's, the largest one's, and a new host's connection.
        for of in [host(1), host(2), host(3)] {
            assert_eq!(surplus(crowd(), of), Some(few), "{of:?}");
        }
        let mut one_less = crowd();
        one_less.pop();
        assert_eq!(surplus(one_less, host(3)), None);
    }

    #[test]
    fn of_two_equal_hosts_the_one_that_asks_for_more_makes_room() {
        let half = ALL / 2;
        let crowd = || silent(host(1), 0..half).chain(silent(host(2), half..ALL)).collect::<Vec<_>>();
        assert_eq!(surplus(crowd(), host(2)), Some(half));
        assert_eq!(surplus(crowd(), host(1)), Some(0));
        assert_eq!(surplus(crowd(), host(3)), Some(0));
    }

    #[test]
    fn what_may_be_a_channel_stays_while_there_are_others() {
        let half = ALL / 2;
        let mut crowd: Vec<_> =
            silent(host(1), 0..half + 50).chain(silent(host(2), half + 50..ALL)).collect();
        for candidate in &mut crowd {
            candidate.missed = candidate.share == host(1);
        }
        assert_eq!(surplus(crowd, host(2)), Some(half + 50));
    }

    #[test]
    fn a_silent_connection_goes_before_a_channel_that_waits_for_main() {
        let mut crowd: Vec<_> = silent(host(2), 1..SHARE + 1).collect();
        for candidate in &mut crowd {
            candidate.waits = candidate.number != 200;
        }
        assert_eq!(surplus(crowd, host(2)), Some(200));
    }

    #[test]
    fn a_share_is_an_address_a_network_of_ipv6_a_user_or_what_cannot_be_told_apart() {
        let ip = |text: &str| Share::of(Some(Host::ip(text.parse().expect("an address"))));
        assert_eq!(ip("::ffff:127.0.0.2"), host(2));
        assert_eq!(ip("2001:db8:1:2::1"), ip("2001:db8:1:2:ffff::7"));
        assert_ne!(ip("2001:db8:1:2::1"), ip("2001:db8:1:3::1"));
        assert_ne!(Share::of(Some(Host::Ip(Ipv6Addr::UNSPECIFIED.into()))), Share::Unknown);
        let process = |pid, uid| Share::of(Some(Host::Process { pid, uid }));
        assert_eq!(process(1, 1000), process(2, 1000));
        assert_ne!(process(1, 1000), process(1, 0));
        assert_eq!(Share::of(None), Share::Unknown);
    }
}
