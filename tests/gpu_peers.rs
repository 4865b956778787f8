//! Several devices in one process: simulated ones, and the machine's cards where there are two or more.

use std::sync::mpsc;

use memory_pool::{DeviceBuffer, DevicePool, Error, GpuDevice, PoolConfig, SimConfig, Stream};

/// Groups of devices that can reach each other.
fn groups() -> Vec<Vec<GpuDevice>> {
    let mut groups = vec![GpuDevice::simulated_group(SimConfig::default().seed(5).memory(4 << 30), 4)];
    let cards: Vec<GpuDevice> =
        (0..GpuDevice::count()).filter_map(|ordinal| GpuDevice::open(ordinal).ok()).collect();
    match cards.len() {
        0 | 1 => eprintln!("{} cards here: simulated devices alone", cards.len()),
        count => {
            eprintln!("with {count} cards");
            groups.push(cards);
        }
    }
    groups
}

fn pools(group: &[GpuDevice]) -> Vec<(DevicePool, Stream)> {
    let make = |gpu: &GpuDevice| {
        (DevicePool::new(gpu, PoolConfig::default_gpu()).unwrap(), gpu.new_stream().unwrap())
    };
    group.iter().map(make).collect()
}

fn clean(group: &[GpuDevice]) {
    group.iter().for_each(|gpu| gpu.synchronize().unwrap());
    if let Some(simulation) = group[0].simulation() {
        assert!(simulation.hazards().is_empty(), "{}", simulation.hazards()[0]);
    }
}

fn values(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|index| index.wrapping_mul(2_654_435_761).wrapping_add(seed)).collect()
}

/// Copies both ways between each pair, and checks what arrived.
fn exchange(pools: &[(DevicePool, Stream)], len: usize) {
    for (from, (source, on)) in pools.iter().enumerate() {
        for (to, (target, stream)) in pools.iter().enumerate() {
            let sent = values((from * 16 + to) as u32, len);
            let buffer = source.alloc_from_host(&sent, on).unwrap();
            // In the order of the target's stream, then of the source's.
            for by in [stream, on] {
                let mut arrived = target.alloc::<u32>(len, stream).unwrap();
                arrived.copy_from_device(&buffer, by).unwrap();
                assert_eq!(arrived.to_vec(stream).unwrap(), sent, "{from} to {to}");
            }
            // Freed with the copy in flight; the next owner overwrites it.
            let mut arrived = target.alloc::<u32>(len, stream).unwrap();
            arrived.copy_from_device(&buffer, stream).unwrap();
            drop(buffer);
            drop(source.alloc::<u32>(len, on).unwrap());
            assert_eq!(arrived.to_vec(stream).unwrap(), sent);
        }
    }
}

#[test]
fn blocks_are_copied_between_all_pairs_of_devices() {
    for group in groups() {
        let pools = pools(&group);
        exchange(&pools, 1000);
        exchange(&pools, 5 << 18);
        clean(&group);
        pools.iter().for_each(|(pool, _)| pool.check().unwrap());
    }
}

#[test]
fn a_peer_reaches_what_was_mapped_before_and_what_is_mapped_after() {
    for group in groups() {
        let pools = pools(&group);
        let before: Vec<_> = pools
            .iter()
            .map(|(pool, stream)| pool.alloc_from_host(&values(1, 1 << 16), stream).unwrap())
            .collect();
        for a in &group {
            for b in &group {
                a.enable_peer_access(b).unwrap();
                // A second time changes nothing.
                a.enable_peer_access(b).unwrap();
            }
        }
        let after: Vec<_> = pools
            .iter()
            .map(|(pool, stream)| pool.alloc_from_host(&values(2, 9 << 20), stream).unwrap())
            .collect();
        for (seed, mut buffer) in before.into_iter().map(|b| (1, b)).chain(after.into_iter().map(|b| (2, b)))
        {
            // Each device writes a part of it by itself, all but the last element.
            let part = buffer.len() / pools.len();
            let mut expected = values(seed, buffer.len());
            for (index, (_, stream)) in pools.iter().enumerate() {
                let range = index * part..(index + 1) * part - 1;
                expected[range.clone()].fill(0);
                buffer.slice_mut(range).unwrap().set_zero(stream).unwrap();
            }
            let home = buffer.stream().clone();
            assert!(buffer.to_vec(&home).unwrap() == expected);
        }
        exchange(&pools, 1 << 18);
        clean(&group);
        for (pool, _) in &pools {
            assert!(pool.trim(0).unwrap() > 0);
            assert_eq!(pool.pool_size(), 0);
            pool.check().unwrap();
        }
    }
}

#[test]
fn a_thread_a_device_passes_buffers_round() {
    for group in groups() {
        for a in &group {
            group.iter().for_each(|b| a.enable_peer_access(b).unwrap());
        }
        let (pools, count) = (pools(&group), group.len());
        let (senders, receivers): (Vec<_>, Vec<_>) =
            pools.iter().map(|_| mpsc::channel::<DeviceBuffer<u32>>()).unzip();
        std::thread::scope(|scope| {
            for (index, receiver) in receivers.into_iter().enumerate() {
                let (pool, stream) = &pools[index];
                let next = senders[(index + 1) % count].clone();
                scope.spawn(move || {
                    let first = pool.alloc_from_host(&values(index as u32, 4096), stream).unwrap();
                    next.send(first).unwrap();
                    for _ in 0..20 {
                        // From the neighbour's memory into ours; its buffer is freed here, on its own stream.
                        let received = receiver.recv().unwrap();
                        let mut own = pool.alloc::<u32>(received.len(), stream).unwrap();
                        own.copy_from_device(&received, stream).unwrap();
                        drop(received);
                        next.send(own).unwrap();
                    }
                    // Passed on as often as there were rounds, it came from the device that many places before.
                    let last = receiver.recv().unwrap();
                    let from = (index + 21 * (count - 1)) % count;
                    let home = last.stream().clone();
                    assert_eq!(last.to_vec(&home).unwrap(), values(from as u32, 4096));
                });
            }
        });
        clean(&group);
        for (pool, _) in &pools {
            assert!(!pool.has_leaks());
            pool.check().unwrap();
        }
    }
}

#[test]
fn devices_that_cannot_reach_each_other_say_so() {
    let one = GpuDevice::simulated(SimConfig::default());
    let other = GpuDevice::simulated(SimConfig::default());
    assert!(matches!(one.enable_peer_access(&other), Err(Error::Cuda { .. })));
    one.enable_peer_access(&one).unwrap();
    let pool = DevicePool::new(&one, PoolConfig::default_gpu()).unwrap();
    assert!(pool.alloc::<u8>(16, &other.new_stream().unwrap()).is_err());
}
