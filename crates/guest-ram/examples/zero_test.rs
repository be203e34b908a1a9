//! Measures how fast zero pages are found, compared with reading and copying memory on this machine, and copies out of
//! guest memory, which may race, compared with copies of private memory, which may not.
//!
//! `cargo run --release -p guest-ram --example zero_test [MiB]`

use std::{io, time::Instant};

use guest_ram::{AlignedBuffer, Mapping};

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
    io::Write::write_all(&mut io::stdout(), out.as_bytes())?;
    for len in [64, 4096, 16 << 10, 64 << 10, 8 << 20] {
        let (guest, private) = copies(&ram, len);
        let ratio = guest / private;
        let line = format!(
            "copy of {len:>7} bytes  {guest:6.2} GB/s, private {private:6.2} GB/s, ratio {ratio:.2}\n"
        );
        io::Write::write_all(&mut io::stdout(), line.as_bytes())?;
    }
    Ok(())
}

/// The speed of copies of `len` bytes between guest memory and a buffer, in and out, and of the same copies between two
/// buffers: best of several short rounds each, in turns, in GB/s.
fn copies(ram: &Mapping, len: usize) -> (f64, f64) {
    let (mut buffer, mut other) = (AlignedBuffer::new(len), AlignedBuffer::new(len));
    let times = (32 << 20) / len;
    let speed = |start: Instant| 2.0 * (times * len) as f64 / start.elapsed().as_secs_f64() / 1e9;
    let (mut guest, mut private) = (0.0_f64, 0.0_f64);
    for _ in 0..40 {
        let start = Instant::now();
        for _ in 0..times {
            if let Some(slice) = std::hint::black_box(ram).slice(0, len) {
                slice.copy_to(std::hint::black_box(&mut *buffer));
                slice.copy_from(std::hint::black_box(&buffer));
            }
        }
        guest = guest.max(speed(start));
        let start = Instant::now();
        for _ in 0..times {
            std::hint::black_box(&mut *buffer).copy_from_slice(std::hint::black_box(&other));
            std::hint::black_box(&mut *other).copy_from_slice(std::hint::black_box(&buffer));
        }
        private = private.max(speed(start));
    }
    (guest, private)
}

/// Calls `visit` for each page; returns the speed in GB/s.
fn each(mapping: &Mapping, page: usize, mut visit: impl FnMut(u64)) -> f64 {
    let start = Instant::now();
    (0..mapping.len()).step_by(page).for_each(&mut visit);
    mapping.len() as f64 / start.elapsed().as_secs_f64() / 1e9
}

const ROUNDS: u64 = 5;
