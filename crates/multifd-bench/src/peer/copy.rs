//! One copy in memory: the upper limit of this machine's memory for any copy of RAM.
//!
//! As many threads as there are channels copy their shares of RAM into fresh memory, within one process. A migration
//! over sockets copies twice.

use std::{thread, time::Instant};

use multifd::ram::Mapping;

use super::{Peer, Sample, Setting, warm::warm};
use crate::{Result, contents::PAGE};

pub(crate) struct Copy {
    setting: Setting,
    ram: Vec<u8>,
}

impl Copy {
    pub(crate) fn new(setting: &Setting) -> Result<Self> {
        let mut ram = vec![0; usize::try_from(setting.ram)?];
        setting.contents.fill(0, &mut ram);
        Ok(Self { setting: *setting, ram })
    }
}

impl Peer for Copy {
    fn round(&mut self) -> Result<Sample> {
        warm(&self.setting)?;
        let start = Instant::now();
        let fresh = Mapping::anonymous(self.setting.ram)?;
        let share = self.ram.len().div_ceil(usize::from(self.setting.channels)).next_multiple_of(PAGE);
        thread::scope(|scope| {
            for (index, bytes) in self.ram.chunks(share).enumerate() {
                let memory = fresh.slice((index * share) as u64, bytes.len());
                scope.spawn(move || memory.expect("as long as RAM").copy_from(bytes));
            }
        });
        let seconds = start.elapsed().as_secs_f64();
        let mut page = [0; PAGE];
        for (index, bytes) in self.ram.chunks(PAGE).enumerate() {
            fresh.slice((index * PAGE) as u64, PAGE).ok_or("a page")?.copy_to(&mut page);
            if page != bytes {
                return Err(format!("page {index} is wrong").into());
            }
        }
        Ok(Sample { seconds, bytes: self.setting.ram, ..Sample::default() })
    }
}
