use std::{fs::File, sync::Arc};

use multifd::{
    Error, Result,
    channel::{
        Address, Stop,
        hand_over::{HandOver, HandOverListener, HandedOver, SharedMemory},
    },
    live::RunState,
    ram::{BlockIndex, Memory, NeverDirty, PageSize, RamBlock, RamBlocks},
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions},
    format::{Configuration, MachineType},
    incoming::Expected,
    source::{Source, SourceOptions},
};

use crate::machine::Machine;

fn block_of(memory: &SharedMemory) -> Result<RamBlock> {
    let mapping = memory.map().map_err(|error| Error::io("map the memory", error))?;
    let (name, length) = (memory.block.clone(), memory.length);
    Ok(RamBlock::new(name, length, PageSize::KIB_4, Memory::Mapped(mapping))?)
}

fn machine_type() -> Result<MachineType> {
    Ok(MachineType::new("my-vmm-1")?)
}

/// Hands the machine, whose one block is mapped from `file`, to the process at `address`.
pub fn hand_over(machine: &mut Machine, file: &File, address: &Address) -> Result<()> {
    // 1. The same memory, mapped once more, as an ignored block: no page of it is sent.
    let block = machine.blocks.block(BlockIndex(0))?;
    let memory = SharedMemory {
        block: block.name().clone(),
        file: file.try_clone().map_err(|error| Error::io("duplicate a descriptor", error))?,
        offset: 0,
        length: block.used_length(),
    };
    // Memory that is not this part of the file is an error here, and nothing is connected.
    block.check_mapped_from(&memory.file, memory.offset)?;
    let blocks = RamBlocks::new(vec![block_of(&memory)?.ignored()])?;
    let connector = HandOver::new(address, &blocks, vec![memory])?;

    // 2. A migration of the devices. On `Ok` the guest is there; after an error it is here.
    let configuration = Configuration { ignore_shared: true, ..Configuration::new(machine_type()?) };
    let options = SourceOptions::new(configuration).channels(0);
    let source = Source::new(Arc::new(blocks), options, &Stop::new())?;
    source.migrate(connector, &mut NeverDirty, machine)?;
    Ok(())
}

/// Takes a machine over.
pub fn take_over(listener: HandOverListener, handed: &HandedOver) -> Result<Machine> {
    let options = ArrivalOptions::new(Expected::Type(machine_type()?));
    let arrival = Arrival::listen(listener, options, &Stop::new())?.accept()?;

    // The memory is mapped here. Nothing may write to it before the confirmation.
    let mut memory = Vec::new();
    let pending = arrival.load(|_, list| {
        memory = handed.take()?;
        list.in_memory_of(&memory)
    })?;
    let count = pending.device("counter", 0).and_then(|(_, bytes)| bytes.try_into().ok());
    let Some(count) = count.map(u64::from_be_bytes) else {
        return Err(pending.refuse(Error::text("expected the device \"counter\"")));
    };

    // Blocks that are not ignored: the machine may migrate to another host later.
    let blocks = RamBlocks::new(memory.iter().map(block_of).collect::<Result<_>>()?)?;
    let mut machine = Machine::new(Arc::new(blocks), count);
    let confirmed = pending.confirm()?;
    if confirmed.run_state() == RunState::Running {
        machine.run();
    }
    confirmed.finish();
    Ok(machine)
}
