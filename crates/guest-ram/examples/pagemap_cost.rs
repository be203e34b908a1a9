//! Measures the cost of the page-table log: switching it on, taking it, and each first write to a page.
//!
//! `cargo run --release -p guest-ram --features pagemap --example pagemap_cost [MiB]`

use std::{error::Error, io, sync::Arc, time::Duration, time::Instant};

use guest_ram::{
    BlockIndex, BlockName, DirtyLog, DirtyPages, Mapping, Memory, PageBitmap, PageIndex, PageSize,
    PagemapLog, RamBlock, RamBlocks,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mib = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(1024_u64);
    let name = BlockName::new("ram").ok_or("a name")?;
    let memory = Memory::Mapped(Mapping::anonymous(mib << 20)?);
    let block = RamBlock::new(name, mib << 20, PageSize::KIB_4, memory)?;
    let blocks = Arc::new(RamBlocks::new(vec![block])?);
    let block = blocks.block(BlockIndex(0))?;
    let pages = block.pages();
    let write = |step: usize| {
        for page in (0..pages).step_by(step).map(PageIndex) {
            if let Some(slice) = block.slice(page, 1) {
                slice.copy_from(&[1; 4096]);
            }
        }
    };
    // Written twice: the writes of the first log split transparent huge pages once.
    write(1);
    let mut out = format!("{mib} MiB, {pages} pages\n");
    let timed = |out: &mut String, what: &str, run: &mut dyn FnMut() -> io::Result<u64>| {
        let start = Instant::now();
        let count = run()?;
        let took: Duration = start.elapsed();
        let each = took.as_nanos() / u128::from(count.max(1));
        *out += &format!("{what:<34} {:9.3} ms {each:7} ns a page\n", took.as_secs_f64() * 1e3);
        Ok::<_, io::Error>(())
    };
    timed(&mut out, "write, without a log", &mut || {
        write(1);
        Ok(pages)
    })?;
    let mut log = None;
    timed(&mut out, "switch on", &mut || {
        log = Some(PagemapLog::start(blocks.clone())?);
        Ok(pages)
    })?;
    let mut log = log.ok_or("a log")?;
    for step in [1, 1, 2, 100] {
        let written = pages.div_ceil(step as u64);
        timed(&mut out, &format!("write one page of {step}"), &mut || {
            write(step);
            Ok(written)
        })?;
        let into = PageBitmap::new(pages);
        timed(&mut out, "  take them", &mut || {
            log.take(BlockIndex(0), &mut DirtyPages::new(&into))?;
            Ok(written)
        })?;
        assert_eq!(into.count(), written, "every page that was written, and no other");
    }
    timed(&mut out, "take nothing", &mut || {
        log.take(BlockIndex(0), &mut DirtyPages::new(&PageBitmap::new(pages)))?;
        Ok(pages)
    })?;
    timed(&mut out, "switch off", &mut || {
        drop(std::mem::replace(&mut log, PagemapLog::start(Arc::default())?));
        Ok(pages)
    })?;
    io::Write::write_all(&mut io::stdout(), out.as_bytes())?;
    Ok(())
}
