//! A machine whose thread rewrites its pages in some order, and checks each before it does.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{Builder, JoinHandle},
};

use multifd::{
    live::{DeviceInfo, DeviceName, DeviceSection, Guest, RunState},
    ram::{BlockIndex, BlockName, DirtyBitmaps, Mapping, Memory, PageIndex, PageSize, RamBlock, RamBlocks},
};

use crate::Result;

pub(super) const DEVICE: DeviceName = DeviceName::from_static("vcpu");

/// Memory of which a guest rewrites `memory` MiB, and never touches 64 MiB.
pub(super) fn blocks(memory: u64) -> Result<RamBlocks> {
    let bytes = (memory + 64) << 20;
    let memory = Memory::Mapped(Mapping::anonymous(bytes)?);
    let name = BlockName::new("ram").ok_or("a name")?;
    Ok(RamBlocks::new(vec![RamBlock::new(name, bytes, PageSize::KIB_4, memory)?])?)
}

/// What a guest rewrites.
#[derive(Clone, Copy)]
pub(super) struct Rewrites {
    /// In MiB.
    pub(super) memory: u64,
    /// How many pages are between one and the next; 1 is in order.
    pub(super) stride: u64,
}

pub(super) struct Machine {
    pub(super) blocks: Arc<RamBlocks>,
    pub(super) writes: DirtyBitmaps,
    /// How many pages it rewrites.
    pages: u64,
    /// How far apart they are.
    stride: u64,
    /// How many pages it has written so far.
    written: Arc<AtomicU64>,
    halt: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Machine {
    pub(super) fn new(blocks: Arc<RamBlocks>, Rewrites { memory, stride }: Rewrites, written: u64) -> Self {
        let (writes, written) = (DirtyBitmaps::new(&blocks), Arc::new(AtomicU64::new(written)));
        let pages = memory << 8;
        Self { blocks, writes, pages, stride, written, halt: Arc::default(), thread: None }
    }

    pub(super) fn run(&mut self) -> io::Result<()> {
        let (blocks, writes) = (self.blocks.clone(), self.writes.clone());
        let (pages, stride, written) = (self.pages, self.stride, self.written.clone());
        self.halt = Arc::default();
        let halt = self.halt.clone();
        let runs = Builder::new().name("vcpu_0".into()).spawn(move || {
            let index = BlockIndex(0);
            let block = blocks.get(index).ok_or_else(|| io::Error::other("no block"))?;
            let mut bytes = [0; 4096];
            while !halt.load(Ordering::Relaxed) {
                let at = written.load(Ordering::Relaxed);
                let page = PageIndex(at % pages * stride % pages);
                block.load(page, &mut bytes)?;
                let expected = if at < pages { 0 } else { at - pages + 1 };
                if bytes[..8] != expected.to_be_bytes() || bytes[4088..] != expected.to_be_bytes() {
                    return Err(io::Error::other(format!("page {} is wrong", page.0)));
                }
                bytes.chunks_mut(8).for_each(|word| word.copy_from_slice(&(at + 1).to_be_bytes()));
                block.store(page, &bytes)?;
                writes.mark(index, page);
                written.store(at + 1, Ordering::Relaxed);
            }
            Ok(())
        })?;
        self.thread = Some(runs);
        Ok(())
    }

    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Whether the guest has found an error.
    pub(super) fn is_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    pub(super) fn halt(&mut self) -> io::Result<()> {
        self.halt.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().map_err(|_| io::Error::other("the guest panicked"))?
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.halt();
    }
}

impl Guest for Machine {
    fn devices(&self) -> Vec<DeviceInfo> {
        vec![DeviceInfo::new(DEVICE, 8)]
    }
    fn run_state(&mut self) -> RunState {
        if self.thread.is_some() { RunState::Running } else { RunState::Paused }
    }
    fn stop(&mut self) -> io::Result<()> {
        self.halt()
    }
    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        let data = self.written().to_be_bytes().to_vec();
        Ok(vec![DeviceSection { name: DEVICE, instance_id: 0, version: 1, data }])
    }
    fn resume(&mut self) {
        let _ = self.run();
    }
}
