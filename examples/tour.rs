//! Every kind of pool at work on a task that a person recognises, beside the system allocator in the same run;
//! then what the pools say of themselves, and what they say of two planted bugs.

use std::alloc::Layout;
use std::time::{Duration, Instant};

use allocator_api2::alloc::{Allocator, Global};
use allocator_api2::boxed::Box;
use allocator_api2::vec::Vec;
use memory_pool::{
    AnyPool, CpuPool, DevicePool, Durability, FixedPool, GlobalPool, GpuDevice, LeakReport, LocalFixedPool,
    LocalVariablePool, LockFreeFixedPool, ManagedPool, OnFinding, PersistentConfig, PersistentPool,
    PinnedPool, PoolConfig, PoolManager, Result, SimConfig, Strategy, VariablePool,
};

/// A generator of numbers: the same for every allocator.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % bound
    }
}

/// The shortest of five runs: what the work takes when nothing disturbs it.
fn shortest(mut work: impl FnMut() -> u64) -> (Duration, u64) {
    let mut best = (Duration::MAX, 0);
    for _ in 0..5 {
        let began = Instant::now();
        let result = std::hint::black_box(work());
        best = (best.0.min(began.elapsed()), result);
    }
    best
}

/// Prints how long `ours` took beside `system`, and that both came to the same result.
fn compare(what: &str, ours: (Duration, u64), system: (Duration, u64)) {
    assert_eq!(ours.1, system.1, "{what}: results differ");
    let (pool, system) = (ours.0.as_secs_f64() * 1e3, system.0.as_secs_f64() * 1e3);
    println!("  {what:<44} {pool:>8.2} ms {system:>10.2} ms {:>8.2} x", system / pool);
}

/// An order book: orders of one size come and go at random.
#[derive(Clone, Copy)]
struct Order {
    id: u64,
    price: u64,
    quantity: u32,
    _customer: [u8; 40],
}

fn order_book<A: Allocator + Copy>(pool: A) -> u64 {
    let mut random = Random(1);
    let mut book = std::vec::Vec::with_capacity(20_000);
    let mut traded = 0;
    for id in 0..200_000 {
        if book.len() < 20_000 && random.below(3) > 0 {
            let (price, quantity) = (random.below(1000) as u64, 1 + id as u32 % 7);
            book.push(Box::new_in(Order { id, price, quantity, _customer: [0; 40] }, pool));
        } else if !book.is_empty() {
            let order: Box<Order, A> = book.swap_remove(random.below(book.len()));
            traded += order.price * u64::from(order.quantity) + order.id % 2;
        }
    }
    traded
}

/// A mail server: messages of every length, some kept, most of them forwarded and dropped.
fn mail<A: Allocator + Copy>(pool: A) -> u64 {
    let mut random = Random(2);
    let mut kept: std::vec::Vec<Vec<u8, A>> = std::vec::Vec::new();
    let mut bytes = 0;
    for number in 0..60_000 {
        let length = 16 << random.below(9);
        let mut message = Vec::with_capacity_in(length + random.below(length), pool);
        message.extend_from_slice(&[number as u8; 16]);
        bytes += message.capacity() as u64 / 16 + u64::from(message[7]);
        if random.below(4) == 0 {
            kept.push(message);
        }
        if kept.len() > 2000 {
            kept.swap_remove(random.below(kept.len()));
        }
    }
    // Pools may hand out a little more than was asked for; what was stored is what counts.
    bytes & !0xffff
}

/// A parser: a tree is built, walked, and thrown away.
enum Tree<'a, A: Allocator> {
    Leaf(u64),
    Sum(Box<Tree<'a, A>, &'a A>, Box<Tree<'a, A>, &'a A>),
}

impl<'a, A: Allocator> Tree<'a, A> {
    fn build(depth: u32, value: u64, pool: &'a A) -> Self {
        if depth == 0 {
            return Self::Leaf(value);
        }
        let branch = |value| Box::new_in(Self::build(depth - 1, value, pool), pool);
        Self::Sum(branch(value), branch(value + 1))
    }
    fn value(&self) -> u64 {
        match self {
            Self::Leaf(value) => *value,
            Self::Sum(left, right) => left.value() + right.value(),
        }
    }
}

fn parser<A: Allocator>(pool: &A) -> u64 {
    (0..20).map(|value| Tree::build(11, value, pool).value()).sum()
}

/// Orders from two threads into one pool.
fn two_threads<A: Allocator + Copy + Send>(pool: A) -> u64 {
    std::thread::scope(|scope| {
        let threads = [0; 2].map(|_| scope.spawn(move || order_book(pool)));
        threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
    })
}

fn host_pools() -> Result<()> {
    println!("\n  host memory                                      this pool     system   system/pool");
    let fixed = FixedPool::new(PoolConfig::fixed_size_cpu(size_of::<Order>()))?;
    let local = LocalFixedPool::new(PoolConfig::fixed_size_cpu(size_of::<Order>()))?;
    let system = shortest(|| order_book(Global));
    compare("order book, FixedPool", shortest(|| order_book(&fixed)), system);
    compare("order book, LocalFixedPool", shortest(|| order_book(&local)), system);
    let system = shortest(|| two_threads(Global));
    let lock_free = LockFreeFixedPool::new(PoolConfig::fixed_size_cpu(size_of::<Order>()))?;
    compare("order book on two threads, LockFreeFixedPool", shortest(|| two_threads(&lock_free)), system);

    let system = shortest(|| mail(Global));
    for strategy in [Strategy::Segregated, Strategy::BestFit, Strategy::FirstFit] {
        let name = format!("mail, VariablePool, {}", strategy.name());
        let pool = VariablePool::new(PoolConfig::default_cpu().strategy(strategy))?;
        compare(&name, shortest(|| mail(&pool)), system);
    }
    let local = LocalVariablePool::new(PoolConfig::default_cpu())?;
    compare("mail, LocalVariablePool", shortest(|| mail(&local)), system);
    let any = AnyPool::new(PoolConfig::default_cpu())?;
    compare("mail, AnyPool", shortest(|| mail(&any)), system);

    let cpu = CpuPool::new(PoolConfig::default_cpu())?;
    compare("mail, CpuPool", shortest(|| mail(&cpu)), system);
    compare("mail, GlobalPool", shortest(|| mail(GlobalPool::new())), system);
    let system = shortest(|| two_threads(Global));
    compare("order book on two threads, CpuPool", shortest(|| two_threads(&cpu)), system);
    compare("order book on two threads, GlobalPool", shortest(|| two_threads(GlobalPool::new())), system);

    let local = LocalFixedPool::new(PoolConfig::fixed_size_cpu(32))?;
    compare("syntax trees, LocalFixedPool", shortest(|| parser(&local)), shortest(|| parser(&Global)));
    Ok(())
}

fn named_pools() -> Result<()> {
    let manager = PoolManager::global();
    manager.create_cpu_pool("orders", PoolConfig::fixed_size_cpu(64).initial_size(1 << 20))?;
    manager.create_cpu_pool("mail", PoolConfig::default_cpu().strategy(Strategy::BestFit))?;
    let orders = manager.cpu_pool("orders")?;
    order_book(&*orders);
    let mut inbox = Vec::new_in(manager.cpu_pool("mail")?);
    inbox.resize(100_000, 0u8);
    let picture = memory_pool::allocate::<u32>(640 * 480)?;
    println!("\nPools by name, and the default pool of the typed helpers:\n\n{}", manager.all_stats());
    println!("\nOne of them closer:\n\n{}", orders.stats());
    drop((inbox, picture));
    manager.destroy_pool("mail")
}

/// An account book in a file: written, closed as at the end of a program, and read by the next.
fn persistent_pool() -> Result<()> {
    let path = std::env::temp_dir().join(format!("memory-pool-tour-{}", std::process::id()));
    let config = PersistentConfig::new(4 << 20).layout("accounts v1").durability(Durability::ProcessCrash);
    let pool = PersistentPool::create(&path, config)?;
    let began = Instant::now();
    for balance in 0..10_000u64 {
        pool.transaction(|tx| {
            let entry = tx.alloc([balance, balance * balance])?;
            tx.set_root("latest", &entry)
        })?;
    }
    let each = began.elapsed().as_nanos() / 10_000;
    // What returns an error leaves nothing behind.
    let failed: Result<()> = pool.transaction(|tx| {
        let entry = tx.alloc([0u64, 0])?;
        tx.set_root("latest", &entry)?;
        Err(PoolConfig::default_cpu().max_size(0).validate().unwrap_err())
    });
    assert!(failed.is_err());
    pool.close()?;

    let pool = PersistentPool::open(&path, "accounts v1")?;
    let latest = pool.read(|r| Ok(*r.root::<[u64; 2]>("latest")?))?;
    assert_eq!(latest, [9999, 9999 * 9999]);
    println!("\nA persistent pool: 10000 transactions, {each} ns each, survive a crash of the process;");
    println!("one that failed left no trace; opened again, the latest entry is {latest:?}.");
    drop(pool);
    let _ = std::fs::remove_file(&path);
    Ok(())
}

/// Writes one byte too far, and forgets to free.
#[inline(never)]
fn plant_bugs(pool: &AnyPool) -> Result<()> {
    let name = pool.allocate(Layout::new::<[u8; 11]>())?.cast::<u8>();
    // SAFETY: not at all: the twelfth byte is the planted bug. The debug layer keeps canaries there.
    unsafe {
        name.copy_from(std::ptr::NonNull::from(b"Hello world\0").cast(), 12);
        pool.deallocate(name);
    }
    let _forgotten = pool.allocate(Layout::new::<[u64; 125]>())?;
    Ok(())
}

fn debugging() -> Result<()> {
    let mut config = PoolConfig::debug_cpu();
    config.debug.on_finding = OnFinding::Collect;
    let pool = AnyPool::new(config)?;
    plant_bugs(&pool)?;
    let watch = pool.diagnostics().expect("debug_cpu watches");
    let (findings, leaks) = (watch.findings(), watch.leaks());
    assert_eq!((findings.len(), leaks.len()), (1, 1));
    println!(
        "\nTwo planted bugs, as the debug layer tells them:\n\n{}\n\n{}",
        findings[0],
        LeakReport::new(leaks)
    );
    Ok(())
}

/// A pipeline of batches: from pinned memory to the device, across two streams, and back.
fn gpu_pools() -> Result<()> {
    let gpu = GpuDevice::open(0).unwrap_or_else(|_| GpuDevice::simulated(SimConfig::default()));
    let what = if gpu.is_simulated() { "no card here, so the device is simulated" } else { "a real card" };
    println!("\nGPU memory on \"{}\" ({what})", gpu.name());
    let (load, compute) = (gpu.new_stream()?, gpu.new_stream()?);
    let device = DevicePool::named(&gpu, "batches", PoolConfig::default_gpu())?;
    let pinned = PinnedPool::named(&gpu, "staging", PoolConfig::default_gpu())?;
    let began = Instant::now();
    let mut sum = 0.0;
    for batch in 0..50 {
        let mut staging = pinned.alloc::<f32>(1 << 18)?;
        staging.fill(batch as f32);
        let mut input = device.alloc::<f32>(1 << 18, &load)?;
        let transfer = input.copy_from_pinned(staging, &load)?;
        let mut output = device.alloc::<f32>(1 << 18, &compute)?;
        output.copy_from_device(&input, &compute)?;
        drop((transfer, input)); // nothing waits; the memory is reused when the work on it is done
        sum += output.copy_to_pinned(pinned.alloc(1 << 18)?, &compute)?.wait()?[77];
    }
    assert_eq!(sum, (0..50).sum::<u32>() as f32);
    println!("  50 batches of 1 MiB to the device and back: {:.1} ms\n", began.elapsed().as_secs_f64() * 1e3);
    device.print_stats();
    pinned.print_stats();

    // Memory of both, on cards that let the CPU touch it at any time.
    match ManagedPool::named(&gpu, "shared", PoolConfig::default_gpu()) {
        Ok(managed) => {
            let mut histogram = Vec::new_in(&managed);
            histogram.extend((0..50u32).map(|batch| batch * batch));
            let mut copy = device.alloc(histogram.len(), &compute)?;
            copy.copy_from_host(&histogram, &compute)?;
            assert_eq!(copy.to_vec(&compute)?, &*histogram);
            managed.print_stats();
        }
        Err(error) => println!("  no managed pool: {error}"),
    }
    if let Some(sim) = gpu.simulation() {
        let hazards = sim.hazards().len();
        println!("\n  the simulated device saw {} driver calls and {hazards} ordering mistakes", sim.calls());
        assert_eq!(hazards, 0);
    }
    Ok(())
}

fn main() -> Result<()> {
    println!("memory-pool {}: each task on a pool and on the system allocator", env!("CARGO_PKG_VERSION"));
    host_pools()?;
    named_pools()?;
    persistent_pool()?;
    gpu_pools()?;
    debugging()
}
