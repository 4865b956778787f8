//! Device memory of one process in another: over simulated devices, and on the machine's card where there is one.

mod children;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command};
use std::time::Duration;

use children::Watch;

use memory_pool::gpu::{SharedDeviceMemory, SharedExport};
use memory_pool::{DevicePool, Error, GpuDevice, PoolConfig, SimConfig};

const SOCKET: &str = "MEMORY_POOL_TEST_SOCKET";
const CARD: &str = "MEMORY_POOL_TEST_CARD";
const ALONE: &str = "MEMORY_POOL_TEST_ALONE";

fn simulated() -> GpuDevice {
    GpuDevice::simulated(SimConfig::default().memory(1 << 30))
}

fn values(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|index| index.wrapping_mul(2_654_435_761).wrapping_add(seed)).collect()
}

/// Elements of the shared buffer: large enough for several handles.
const LEN: usize = 9 << 20;

/// The other process: reads what the first wrote, writes, and reads again after the first is gone.
fn second_process(path: &str) {
    let gpu = if std::env::var_os(CARD).is_some() { GpuDevice::open(0).unwrap() } else { simulated() };
    let mut socket = UnixStream::connect(path).unwrap();
    let export = SharedExport::receive(&socket).unwrap();
    assert_eq!(export.len(), LEN * 4);
    let stream = gpu.new_stream().unwrap();
    // SAFETY: the first process waits for our word before it frees its buffer.
    let mut shared = unsafe { SharedDeviceMemory::import(&gpu, export) }.unwrap();
    let mut read = vec![0u32; LEN];
    shared.copy_to_host(0, &mut read, &stream).unwrap();
    assert!(read == values(1, LEN));
    shared.copy_from_host(4 * 1000, &values(2, 5000), &stream).unwrap();
    // Outside of the block there is nothing for us.
    assert!(matches!(shared.copy_to_host(4, &mut read, &stream), Err(Error::InvalidPointer(_))));
    assert!(shared.copy_from_host(usize::MAX, &[1u8], &stream).is_err());
    socket.write_all(b"written").unwrap();
    // Until the first process freed and trimmed everything.
    let mut word = [0; 5];
    socket.read_exact(&mut word).unwrap();
    // What is mapped here is memory yet, though nobody's block.
    shared.copy_to_host(0, &mut read[..10], &stream).unwrap();
    drop(shared);
    socket.write_all(b"over").unwrap();
}

/// The child's connection; a child that ends without one is a failure.
fn accept(listener: &UnixListener, child: &mut Child) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                socket.set_nonblocking(false).unwrap();
                return socket;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                assert_eq!(child.try_wait().unwrap(), None, "it never called");
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn two_processes(gpu: &GpuDevice, card: bool) {
    let path = std::env::temp_dir().join(format!("memory-pool-share-{}-{card}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["another_process_reads_and_writes", "--exact", "--nocapture"]).env(SOCKET, &path);
    if card {
        child.env(CARD, "1");
    }
    let mut child = child.spawn().unwrap();
    let watch = Watch::over(&child);
    let mut socket = accept(&listener, &mut child);
    std::fs::remove_file(&path).unwrap();

    let stream = gpu.new_stream().unwrap();
    let pool = DevicePool::new(gpu, PoolConfig::default_gpu()).unwrap();
    let before = pool.alloc_from_host(&values(7, 3000), &stream).unwrap();
    let buffer = pool.alloc_from_host(&values(1, LEN), &stream).unwrap();
    let after = pool.alloc_from_host(&values(8, 3000), &stream).unwrap();
    stream.synchronize().unwrap();
    buffer.share().unwrap().send(&socket).unwrap();
    let mut word = [0; 7];
    socket.read_exact(&mut word).unwrap();
    let mut expected = values(1, LEN);
    expected[1000..6000].copy_from_slice(&values(2, 5000));
    assert!(buffer.to_vec(&stream).unwrap() == expected);
    assert!(
        before.to_vec(&stream).unwrap() == values(7, 3000)
            && after.to_vec(&stream).unwrap() == values(8, 3000)
    );
    drop((before, buffer, after));
    stream.synchronize().unwrap();
    pool.trim(0).unwrap();
    assert_eq!(pool.pool_size(), 0);
    drop(pool);
    socket.write_all(b"freed").unwrap();
    let mut word = [0; 4];
    socket.read_exact(&mut word).unwrap();
    let ended = child.wait().unwrap();
    drop(watch);
    assert!(ended.success());
}

#[test]
fn another_process_reads_and_writes() {
    if let Ok(path) = std::env::var(SOCKET) {
        return second_process(&path);
    }
    two_processes(&simulated(), false);
    match GpuDevice::open(0) {
        Ok(gpu) => two_processes(&gpu, true),
        Err(error) => eprintln!("on the simulated device alone: {error}"),
    }
}

#[test]
fn a_raw_block_is_shared_with_a_second_device_of_the_same_process() {
    let (gpu, other) = (simulated(), simulated());
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let (stream, theirs) = (gpu.new_stream().unwrap(), other.new_stream().unwrap());
    let block = pool.allocate_async(5000, &stream).unwrap();
    let (here, there) = UnixStream::pair().unwrap();
    pool.share(block).unwrap().send(&here).unwrap();
    // SAFETY: the block is freed after the import is gone.
    let mut shared =
        unsafe { SharedDeviceMemory::import(&other, SharedExport::receive(&there).unwrap()) }.unwrap();
    assert!(shared.len() >= 5000 && !shared.is_empty() && shared.device().same(&other));
    shared.copy_from_host(100, &[7u8; 64], &theirs).unwrap();
    let mut read = [0u8; 64];
    shared.copy_to_host(100, &mut read, &theirs).unwrap();
    assert_eq!(read, [7; 64]);
    let wrong = shared.copy_to_host(0, &mut read, &stream);
    assert!(wrong.is_err(), "a stream of another device");
    drop(shared);
    assert_eq!(other.simulation().unwrap().memory_in_use(), 0);
    // SAFETY: live, freed once.
    unsafe { pool.deallocate_async(block, &stream) };
    assert!(matches!(pool.share(block), Err(Error::InvalidPointer(_))), "it is free");
    assert!(
        gpu.simulation().unwrap().hazards().is_empty() && other.simulation().unwrap().hazards().is_empty()
    );
}

#[test]
fn what_cannot_be_shared_says_why() {
    let plain = GpuDevice::simulated(SimConfig::default().virtual_memory(false));
    let stream = plain.new_stream().unwrap();
    let pool = DevicePool::new(&plain, PoolConfig::default_gpu()).unwrap();
    let buffer = pool.alloc::<u8>(100, &stream).unwrap();
    assert!(buffer.share().is_err(), "memory without a handle");
    // An empty buffer is an export of nothing.
    let empty = pool.alloc::<u8>(0, &stream).unwrap().share().unwrap();
    let (here, there) = UnixStream::pair().unwrap();
    empty.send(&here).unwrap();
    // SAFETY: there is nothing in it.
    let import =
        unsafe { SharedDeviceMemory::import(&plain, SharedExport::receive(&there).unwrap()) }.unwrap();
    assert!(import.is_empty());
}

/// Descriptors that this process has open.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

#[test]
fn messages_that_are_none_are_refused_and_leave_nothing_behind() {
    let refuse = |bytes: &[u8]| {
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(bytes).unwrap();
        drop(here);
        SharedExport::receive(&there).unwrap_err()
    };
    refuse(b"");
    refuse(b"no export at all, but long enough for a head: 0123456789");
    let gpu = simulated();
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let stream = gpu.new_stream().unwrap();
    let buffer = pool.alloc::<u8>(100, &stream).unwrap();
    let (here, mut there) = UnixStream::pair().unwrap();
    buffer.share().unwrap().send(&here).unwrap();
    let mut good = [0; 40];
    there.read_exact(&mut good).unwrap();
    drop((here, there));
    // Cut short, with huge counts, with a length of 0, without its descriptors.
    for cut in [1, 8, 31, 39, 40] {
        refuse(&good[..cut]);
    }
    for (word, value) in [(1, u64::MAX), (1, 1 << 40), (4, 0)] {
        let mut bad = good;
        bad[word * 8..word * 8 + 8].copy_from_slice(&value.to_ne_bytes());
        refuse(&bad);
    }
    let mut counted = good.to_vec();
    counted.push(1);
    refuse(&counted);
}

#[test]
fn every_step_may_fail_and_nothing_is_lost() {
    // Alone in a process, where nobody else opens descriptors.
    if std::env::var_os(ALONE).is_none() {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["every_step_may_fail_and_nothing_is_lost", "--exact", "--nocapture"]).env(ALONE, "1");
        let output = children::output_of(&mut child).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let (gpu, other) = (simulated(), simulated());
    let (mine, theirs) = (gpu.simulation().unwrap(), other.simulation().unwrap());
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let stream = gpu.new_stream().unwrap();
    let buffer = pool.alloc_from_host(&values(3, 6 << 20), &stream).unwrap();
    let (here, there) = UnixStream::pair().unwrap();
    // Once without a fault, so that the pieces have their files.
    drop(buffer.share().unwrap());
    let open = descriptors();
    for nth in 1..40 {
        mine.fail_call(nth, 2);
        let export = buffer.share();
        let failed = !mine.cancel_fault();
        assert_eq!(export.is_err(), failed);
        let Ok(export) = export else { continue };
        export.send(&here).unwrap();
        drop(export);
        let export = SharedExport::receive(&there).unwrap();
        theirs.fail_call(nth, 2);
        // SAFETY: the buffer outlives the import.
        let import = unsafe { SharedDeviceMemory::import(&other, export) };
        if let Ok(import) = &import {
            let mut read = [0u32; 8];
            let stream = other.new_stream();
            if let Ok(stream) = stream
                && import.copy_to_host(0, &mut read, &stream).is_ok()
            {
                assert_eq!(read[..], values(3, 8));
            }
        }
        drop(import);
        theirs.cancel_fault();
        assert_eq!((descriptors(), theirs.memory_in_use()), (open, 0), "call {nth}");
    }
    assert!(buffer.to_vec(&stream).unwrap() == values(3, 6 << 20));
}
