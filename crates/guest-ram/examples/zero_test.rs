//! Measures how fast zero pages are found, compared with reading and copying memory on this machine.
//!
//! `cargo run --release -p guest-ram --example zero_test [MiB]`

use std::{io, time::Instant};

use guest_ram::Mapping;

fn main() -> io::Result<()> {
    let mib = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(1024_u64);
    let (bytes, page) = (mib << 20, 4096);
    let (ram, copy) = (Mapping::anonymous(bytes)?, Mapping::anonymous(bytes)?);
    let mut buffer = vec![0; page];
    // Written once, so that every page is in memory and none is the system's shared zero page.
    for mapping in [&ram, &copy] {
        each(mapping, page, |at| {
            if let Some(slice) = mapping.slice(at, page) {
                slice.copy_from(&buffer);
            }
        });
    }
    let (mut zero, mut best) = (0, [0.0_f64; 4]);
    for _ in 0..ROUNDS {
        let mut note = |way: usize, gb: f64| best[way] = best[way].max(gb);
        note(0, each(&ram, page, |at| zero += u64::from(ram.slice(at, page).is_some_and(|s| s.is_zero()))));
        note(1, each(&ram, page, |at| ram.slice(at, page).into_iter().for_each(|s| s.copy_to(&mut buffer))));
        note(
            2,
            each(&ram, page, |at| {
                if let (Some(from), Some(to)) = (ram.slice(at, page), copy.slice(at, page)) {
                    from.copy_to(&mut buffer);
                    to.copy_from(&buffer);
                }
            }),
        );
        let hot = Instant::now();
        for at in 0..bytes / page as u64 {
            zero += u64::from(ram.slice(at % 4 * page as u64, page).is_some_and(|slice| slice.is_zero()));
        }
        note(3, bytes as f64 / hot.elapsed().as_secs_f64() / 1e9);
    }
    assert_eq!(zero, 2 * ROUNDS * bytes / page as u64, "every page is zero");
    let out = format!(
        "{mib} MiB, best of {ROUNDS}\nzero test           {:6.2} GB/s\nread (to one page)  {:6.2} GB/s\ncopy                {:6.2} GB/s\nzero test in cache  {:6.2} GB/s\nzero test / read    {:6.2}\n",
        best[0],
        best[1],
        best[2],
        best[3],
        best[0] / best[1]
    );
    io::Write::write_all(&mut io::stdout(), out.as_bytes())
}

/// Calls `visit` for each page; returns the speed in GB/s.
fn each(mapping: &Mapping, page: usize, mut visit: impl FnMut(u64)) -> f64 {
    let start = Instant::now();
    (0..mapping.len()).step_by(page).for_each(&mut visit);
    mapping.len() as f64 / start.elapsed().as_secs_f64() / 1e9
}

const ROUNDS: u64 = 5;
