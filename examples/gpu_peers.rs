//! Several cards from one process: a pool a card, a thread a card, copies between all pairs, memory of one card written
//! by another, and a block that a second process reads and writes. Everything is checked; times are printed.
//!
//! ```text
//! cargo run --release --example gpu_peers          # all cards, or four simulated devices where there are fewer than two
//! ```

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use memory_pool::gpu::{SharedDeviceMemory, SharedExport};
use memory_pool::{DeviceBuffer, DevicePool, GpuDevice, PoolConfig, SimConfig, Stream};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Where the second process finds the first.
const SOCKET: &str = "GPU_PEERS_SOCKET";
/// Which card the second process uses; none for a simulated device.
const CARD: &str = "GPU_PEERS_CARD";

struct Place {
    gpu: GpuDevice,
    pool: DevicePool,
    stream: Stream,
}

impl Place {
    fn new(gpu: GpuDevice) -> Outcome<Self> {
        let pool = DevicePool::new(&gpu, PoolConfig::default_gpu())?;
        Ok(Self { stream: gpu.new_stream()?, pool, gpu })
    }
}

fn values(seed: usize, len: usize) -> Vec<u32> {
    (0..len as u32).map(|index| index.wrapping_mul(2_654_435_761).wrapping_add(seed as u32)).collect()
}

fn main() -> Outcome {
    if let Ok(path) = std::env::var(SOCKET) {
        return second_process(&path);
    }
    let mut cards: Vec<GpuDevice> = (0..GpuDevice::count()).map(GpuDevice::open).collect::<Result<_, _>>()?;
    let simulated = cards.len() < 2;
    if simulated {
        println!("{} cards here, so four simulated devices; their times mean nothing", cards.len());
        cards = GpuDevice::simulated_group(SimConfig::default().memory(8 << 30).eagerness(255), 4);
    }
    let places = cards.into_iter().map(Place::new).collect::<Outcome<Vec<_>>>()?;
    for (index, place) in places.iter().enumerate() {
        println!("device {index}: {}, {} MiB", place.gpu.name(), place.gpu.total_memory() >> 20);
    }
    let bytes = if simulated { 8 << 20 } else { 512 << 20 };
    own_work(&places)?;
    let before: Vec<_> = places
        .iter()
        .map(|place| place.pool.alloc::<u32>(1 << 18, &place.stream))
        .collect::<Result<_, _>>()?;
    copies(&places, bytes, "without peer access")?;
    for a in &places {
        for b in &places {
            a.gpu.enable_peer_access(&b.gpu)?;
        }
    }
    copies(&places, bytes, "with peer access")?;
    written_by_peers(&places, before)?;
    for (index, place) in places.iter().enumerate() {
        let next = (index + 1) % places.len();
        shared_with_a_process(place, (!simulated).then_some(next))?;
        println!("device {index}: shared with a process on device {next}, read and written there");
    }
    for place in &places {
        place.gpu.synchronize()?;
        if let Some(simulation) = place.gpu.simulation() {
            assert!(simulation.hazards().is_empty(), "{:?}", simulation.hazards());
        }
        place.pool.check()?;
        place.pool.trim(0)?;
        assert!(!place.pool.has_leaks() && place.pool.pool_size() == 0, "something was left behind");
    }
    println!("all right");
    Ok(())
}

/// A thread a device, each with its own pool and stream: pairs that never meet the others.
fn own_work(places: &[Place]) -> Outcome {
    // A simulated device records every call.
    let pairs = if places[0].gpu.is_simulated() { 1000 } else { 100_000 };
    let times: Vec<Duration> = std::thread::scope(|scope| {
        let work = |place: &Place| -> memory_pool::Result<Duration> {
            let mut start = Instant::now();
            for pair in 0..=pairs {
                let block = place.pool.allocate_async(1 << 20, &place.stream)?;
                // SAFETY: just allocated, and no work was issued on it.
                unsafe { place.pool.deallocate_async(block, &place.stream) };
                if pair == 0 {
                    // The first one asked the driver.
                    start = Instant::now();
                }
            }
            Ok(start.elapsed())
        };
        let threads: Vec<_> = places.iter().map(|place| scope.spawn(move || work(place))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or(Ok(Duration::ZERO)))
            .collect::<Result<_, _>>()
    })?;
    let each: Vec<String> =
        times.iter().map(|time| format!("{:.0}", time.as_nanos() as f64 / f64::from(pairs))).collect();
    println!("a thread a device, ns a pair of 1 MiB: {}", each.join(", "));
    Ok(())
}

/// Between all pairs, on the receiver's stream; the next owner of the source's memory overwrites it at once.
fn copies(places: &[Place], bytes: usize, how: &str) -> Outcome {
    println!("copies {how}, GB/s (from a row to a column)");
    for (from, source) in places.iter().enumerate() {
        let mut row = format!("{from:>4}");
        for (to, target) in places.iter().enumerate() {
            let sent = values(from * 16 + to, bytes / 4);
            let buffer = source.pool.alloc_from_host(&sent, &source.stream)?;
            let mut arrived = target.pool.alloc::<u32>(bytes / 4, &target.stream)?;
            arrived.copy_from_device(&buffer, &target.stream)?;
            target.stream.synchronize()?;
            let start = Instant::now();
            arrived.copy_from_device(&buffer, &target.stream)?;
            target.stream.synchronize()?;
            let time = start.elapsed();
            arrived.set_zero(&target.stream)?;
            arrived.copy_from_device(&buffer, &target.stream)?;
            drop(buffer);
            let mut next = source.pool.alloc::<u32>(bytes / 4, &source.stream)?;
            next.set_zero(&source.stream)?;
            assert!(arrived.to_vec(&target.stream)? == sent, "from {from} to {to}");
            row += &format!("{:>8.1}", bytes as f64 / time.as_nanos() as f64);
        }
        println!("{row}");
    }
    Ok(())
}

/// Blocks from before and after peer access began; each device writes its part of each.
fn written_by_peers(places: &[Place], before: Vec<DeviceBuffer<u32>>) -> Outcome {
    let after: Vec<_> = places
        .iter()
        .map(|place| place.pool.alloc::<u32>(9 << 20, &place.stream))
        .collect::<Result<_, _>>()?;
    for mut buffer in before.into_iter().chain(after) {
        let home = buffer.stream().clone();
        let mut expected = values(3, buffer.len());
        buffer.copy_from_host(&expected, &home)?;
        let part = buffer.len() / places.len();
        for (index, place) in places.iter().enumerate() {
            let range = index * part..(index + 1) * part - 1;
            expected[range.clone()].fill(0);
            buffer.slice_mut(range)?.set_zero(&place.stream)?;
        }
        assert!(buffer.to_vec(&home)? == expected, "a device did not write its part");
    }
    println!("each device wrote its part of every other's blocks");
    Ok(())
}

/// Elements of the block that is shared.
const SHARED: usize = 5 << 20;

fn shared_with_a_process(place: &Place, card: Option<usize>) -> Outcome {
    let path = std::env::temp_dir().join(format!("gpu-peers-{}", std::process::id()));
    let listener = UnixListener::bind(&path)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.env(SOCKET, &path);
    if let Some(card) = card {
        command.env(CARD, card.to_string());
    }
    let child = Killed(command.spawn()?);
    let (mut socket, _) = listener.accept()?;
    std::fs::remove_file(&path)?;
    let buffer = place.pool.alloc_from_host(&values(1, SHARED), &place.stream)?;
    place.stream.synchronize()?;
    buffer.share()?.send(&socket)?;
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    socket.read_exact(&mut [0])?;
    let mut expected = values(1, SHARED);
    expected[1000..6000].copy_from_slice(&values(2, 5000));
    assert!(buffer.to_vec(&place.stream)? == expected, "what the other process wrote is not there");
    child.end()
}

/// A process that does not outlive this one.
struct Killed(Child);

impl Killed {
    fn end(mut self) -> Outcome {
        if self.0.wait()?.success() { Ok(()) } else { Err("the other process failed".into()) }
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn second_process(path: &str) -> Outcome {
    let gpu = match std::env::var(CARD) {
        Ok(card) => GpuDevice::open(card.parse()?)?,
        Err(_) => GpuDevice::simulated(SimConfig::default()),
    };
    let mut socket = UnixStream::connect(path)?;
    let stream = gpu.new_stream()?;
    // SAFETY: the first process keeps its buffer until this one answers, and does not touch it.
    let mut shared = unsafe { SharedDeviceMemory::import(&gpu, SharedExport::receive(&socket)?) }?;
    let mut read = vec![0u32; SHARED];
    shared.copy_to_host(0, &mut read, &stream)?;
    assert!(read == values(1, SHARED), "the block arrived damaged");
    shared.copy_from_host(4 * 1000, &values(2, 5000), &stream)?;
    drop(shared);
    socket.write_all(&[1])?;
    Ok(())
}
