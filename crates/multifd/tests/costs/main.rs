//! The cost of a gibibyte, counted and not timed: calls, vectors, bytes that are not pages.
//!
//! Counts do not depend on the load of a machine, so an accidental increase is found on any machine. The number of
//! calls to receive depends on how many bytes have arrived at each call. So it is counted as if all had arrived, and
//! the number of real calls has a wide bound, which is far below one call per page.

#[cfg(test)]
mod copied;
#[cfg(test)]
mod counted;
#[cfg(test)]
mod kit;

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, process::Command, sync::Arc};

    use multifd::{Method, wire::head_len};
    use multifd_testkit::lacks;

    use crate::{
        copied::{copy, in_file},
        counted::{CountedConnector, CountedListener, Counts},
        kit::{CHANNELS, PAGE_SIZE, PAGES, PASSES, ends, migrate, ram, wrong_page},
    };

    /// Of 512 KiB.
    const PACKET_PAGES: u64 = 128;
    const PACKETS: u64 = PASSES * PAGES / PACKET_PAGES;
    /// At the set-up, after each pass and at the end of RAM, on each channel.
    const SYNCS: u64 = (2 + PASSES) * CHANNELS as u64;
    const INITIAL: u64 = 64;
    const PAYLOAD: u64 = PASSES * PAGES * PAGE_SIZE.bytes() as u64;

    #[test]
    fn packet_costs_one_call_and_two_vectors_a_side_and_none_of_its_pages_is_copied() {
        let (source, destination) = (ram(true), ram(false));
        let (connector, listener) = ends();
        let (sent, received) = (Counts::of(&source), Counts::of(&destination));
        let connector = CountedConnector::new(connector, sent.clone());
        let listener = CountedListener::new(listener, received.clone());
        let ends = (Arc::new(connector) as Arc<_>, Box::new(listener) as Box<_>);
        migrate(ends, [&source, &destination], Method::None, |_| {});
        assert_eq!(wrong_page(&destination), None);

        let heads = (PACKETS + SYNCS) * head_len(PAGE_SIZE) as u64;
        let channels = u64::from(CHANNELS);
        let sent = sent.channels();
        // The initial packet, each packet, each SYNC.
        assert_eq!(sent.calls, channels + PACKETS + SYNCS, "calls to send");
        // Adjacent pages are one vector, after the head.
        assert_eq!(sent.vectors, channels + 2 * PACKETS + SYNCS, "vectors to send");
        assert_eq!(sent.in_place, PAYLOAD, "bytes sent from where they are");
        assert_eq!(sent.elsewhere, channels * INITIAL + heads, "bytes sent from buffers");

        let received = received.channels();
        // Each packet's pages with the next head; a head after which no pages follow; the end, which has no byte.
        let lone = received.calls - PACKETS;
        assert!(lone <= channels * (2 + 1 + 1) + SYNCS, "{lone} calls to receive that brought no page");
        assert!(received.vectors <= 2 * PACKETS + lone, "{} vectors to receive", received.vectors);
        assert_eq!(received.in_place, PAYLOAD, "bytes received where they belong");
        assert_eq!(received.elsewhere, channels * INITIAL + heads, "bytes received into buffers");
    }

    /// `strace` runs this test, too.
    #[test]
    fn ram_moves_twice_over_real_sockets() {
        let (source, destination) = (ram(true), ram(false));
        migrate(ends(), [&source, &destination], Method::None, |_| {});
        assert_eq!(wrong_page(&destination), None);
    }

    /// `strace` runs this test, too.
    #[test]
    fn ram_is_copied_into_a_file_and_back() {
        let (source, restored) = (ram(true), ram(false));
        let file = in_file(&tempfile::tempfile().expect("a file"));
        copy(&source, &file);
        copy(&file, &restored);
        assert_eq!(wrong_page(&restored), None);
    }

    /// A stretch of 8 MiB is one call, if it begins at a boundary; in a file in memory, five more calls make huge
    /// pages.
    #[test]
    fn copy_into_a_file_and_back_costs_a_handful_of_calls_for_each_8_mib() {
        let Some((text, calls)) = traced("ram_is_copied_into_a_file_and_back") else { return };
        let stretches = PAGES * PAGE_SIZE.bytes() as u64 / (8 << 20);
        let count = |name: &str| calls.get(name).copied().unwrap_or(0);
        let written = stretches..=6 * (stretches + 2);
        assert!(written.contains(&count("pwrite64")), "pwrite64: {}\n{text}", count("pwrite64"));
        let read = stretches..=2 * (stretches + 2);
        assert!(read.contains(&count("pread64")), "pread64: {}\n{text}", count("pread64"));
    }

    #[test]
    fn system_is_asked_far_less_often_than_once_a_page() {
        let Some((text, calls)) = traced("ram_moves_twice_over_real_sockets") else { return };
        let gibibyte = PAYLOAD as f64 / f64::from(1 << 30);
        for (name, count) in calls.iter().filter(|(_, count)| **count >= PACKETS / 16) {
            println!("{name}: {count}, {:.0} a GiB", *count as f64 / gibibyte);
        }
        let count = |name: &str| calls.get(name).copied().unwrap_or(0);
        let channels = u64::from(CHANNELS);
        let least = channels + PACKETS + SYNCS;
        assert!((least..=2 * least).contains(&count("sendmsg")), "sendmsg: {}", count("sendmsg"));
        assert!(count("recvmsg") >= PACKETS, "recvmsg: {}", count("recvmsg"));
        let all: u64 = calls.values().sum();
        assert!(all <= PASSES * PAGES / 2, "{all} calls for {} pages\n{text}", PASSES * PAGES);
    }

    /// The system calls of a test in this file: a summary, and the counts by name.
    fn traced(test: &str) -> Option<(String, BTreeMap<String, u64>)> {
        let folder = tempfile::tempdir().expect("a folder");
        let summary = folder.path().join("calls");
        let mut strace = Command::new("strace");
        strace.args(["-f", "-q", "-c", "-o"]).arg(&summary);
        strace.arg(std::env::current_exe().expect("this program"));
        strace.args(["--exact", &format!("tests::{test}"), "--test-threads=1"]);
        match strace.output() {
            Err(error) => {
                lacks(&format!("strace cannot be started: {error}"));
                return None;
            }
            Ok(output) if !output.status.success() => {
                let text = String::from_utf8_lossy(&output.stderr);
                if text.contains("ptrace") {
                    lacks(&format!("strace may not look at programs here: {}", text.trim()));
                    return None;
                }
                panic!("{}{text}", String::from_utf8_lossy(&output.stdout));
            }
            Ok(_) => {}
        }
        let text = std::fs::read_to_string(&summary).expect("a summary");
        let calls = calls(&text);
        Some((text, calls))
    }

    /// The counts of a summary, by name.
    fn calls(text: &str) -> BTreeMap<String, u64> {
        let lines = text.lines().filter_map(|line| {
            // % time, seconds, usecs/call, calls, errors if any, name
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            let name = words.last().filter(|name| **name != "total")?;
            Some(((*name).to_owned(), words.get(3)?.parse().ok()?))
        });
        lines.collect()
    }
}
