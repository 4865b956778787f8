//! The GPU pools on a real card. Without one, every test says so and passes.

#![cfg(feature = "cuda")]

mod gpu_suite;

use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use memory_pool::{DevicePool, DeviceVec, Error, GpuDevice, ManagedPool, PinnedPool, PoolConfig, Stream};

/// The card, for one test at a time: some of them take most of its memory.
struct Card {
    gpu: GpuDevice,
    _alone: MutexGuard<'static, ()>,
}

impl Deref for Card {
    type Target = GpuDevice;
    fn deref(&self) -> &GpuDevice {
        &self.gpu
    }
}

/// The card, or `None` with a line that says why.
fn card() -> Option<Card> {
    static CARD: OnceLock<Result<GpuDevice, Error>> = OnceLock::new();
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    match CARD.get_or_init(|| GpuDevice::open(0)) {
        Ok(gpu) => Some(Card { gpu: gpu.clone(), _alone }),
        Err(error) => {
            eprintln!("skipped, there is no card here: {error}");
            None
        }
    }
}

fn streams(gpu: &GpuDevice, count: usize) -> Vec<Stream> {
    (0..count).map(|_| gpu.new_stream().unwrap()).collect()
}

#[test]
fn opening_what_is_not_there_is_an_error() {
    assert!(matches!(GpuDevice::open(1000), Err(Error::NoDriver | Error::NoDevice { .. })));
}

#[test]
fn buffers_carry_data() {
    let Some(gpu) = card() else { return };
    let s = streams(&gpu, 2);
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let source: Vec<u32> = (0..1_000_000).collect();
    let mut a = pool.alloc_from_host(&source, &s[0]).unwrap();
    let mut b = pool.alloc::<u32>(source.len(), &s[1]).unwrap();
    assert!(b.to_vec(&s[1]).unwrap().iter().all(|&x| x == 0));
    b.copy_from_device(&a, &s[1]).unwrap();
    a.set_zero(&s[0]).unwrap();
    assert_eq!(b.to_vec(&s[0]).unwrap(), source);
    let (mut left, right) = b.split_at_mut(500_000).unwrap();
    left.copy_from_device(&right, &s[0]).unwrap();
    assert_eq!(b.to_vec(&s[1]).unwrap()[..500_000], source[500_000..]);
    let mut vec = DeviceVec::<u64>::new_in(&pool, &s[0]);
    for value in 0..2000 {
        vec.push(value).unwrap();
    }
    assert_eq!(vec.to_vec().unwrap(), (0..2000).collect::<Vec<_>>());
    drop((a, b, vec));
    gpu.synchronize().unwrap();
    assert!(pool.trim(0).unwrap() > 0);
    pool.check().unwrap();
    assert_eq!(pool.pool_size(), 0);
}

#[test]
fn transfers_own_their_buffers() {
    let Some(gpu) = card() else { return };
    let s = streams(&gpu, 1);
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let pinned = PinnedPool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let mut device = pool.alloc::<f32>(1 << 20, &s[0]).unwrap();
    for round in 0..20 {
        let mut host = pinned.alloc::<f32>(1 << 20).unwrap();
        host.fill(round as f32);
        let transfer = device.copy_from_pinned(host, &s[0]).unwrap();
        if round % 2 == 0 {
            drop(transfer);
        } else {
            assert_eq!(transfer.wait().unwrap()[77], round as f32);
        }
        let back = device.copy_to_pinned(pinned.alloc(1 << 20).unwrap(), &s[0]).unwrap().wait().unwrap();
        assert!(back.iter().all(|&x| x == round as f32));
    }
    let (from, mut to) = (vec![3.5f32; 1 << 20], vec![0f32; 1 << 20]);
    s[0].scope(|scope| {
        scope.copy_from_host(&mut device, &from)?;
        scope.copy_to_host(&device, &mut to)
    })
    .unwrap();
    assert_eq!(from, to);
}

#[test]
fn managed_and_pinned_memory_hold_containers() {
    let Some(gpu) = card() else { return };
    let pinned = PinnedPool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let mut map = hashbrown::HashMap::new_in(&pinned);
    (0..10_000u32).for_each(|key| _ = map.insert(key, key * 2));
    assert_eq!(map[&777], 1554);
    let managed = match ManagedPool::new(&gpu, PoolConfig::default_gpu()) {
        Ok(pool) => pool,
        Err(error) => return eprintln!("skipped, managed memory: {error}"),
    };
    let mut values = allocator_api2::vec::Vec::new_in(&managed);
    values.extend(0..100_000u32);
    assert_eq!(values.iter().map(|&x| u64::from(x)).sum::<u64>(), 4_999_950_000);
}

/// Random blocks on random streams, each filled on the device and read back: a block handed out too early
/// shows another's bytes.
#[test]
fn streams_never_see_each_others_bytes() {
    let Some(gpu) = card() else { return };
    let mut seed = 88_172_645_463_325_252u64;
    let mut random = |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 11) as usize % below
    };
    let mut s = streams(&gpu, 4);
    s.push(gpu.default_stream());
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().max_size(64 << 20)).unwrap();
    let mut live = Vec::new();
    for round in 0..3000u32 {
        let stream = &s[random(s.len())];
        let len = 1 + random(1 << 18);
        match pool.alloc_from_host(&vec![round; len], stream) {
            Ok(buffer) => live.push((buffer, round)),
            Err(Error::OutOfMemory { .. }) => live.clear(),
            Err(error) => panic!("{error}"),
        }
        if live.len() > 20 {
            let (buffer, mark) = live.swap_remove(random(live.len()));
            if random(4) == 0 {
                let other = &s[random(s.len())];
                assert!(buffer.to_vec(other).unwrap().iter().all(|&x| x == mark), "round {round}");
            }
        }
        if round % 500 == 499 {
            s[random(4)] = gpu.new_stream().unwrap();
        }
    }
    for (buffer, mark) in live {
        assert!(buffer.to_vec(&s[0]).unwrap().iter().all(|&x| x == mark));
    }
    pool.check().unwrap();
}

#[test]
fn graphs_keep_their_memory() {
    let Some(gpu) = card() else { return };
    let s = streams(&gpu, 2);
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let source = pool.alloc_from_host(&[1u32, 2, 3, 4], &s[0]).unwrap();
    let mut target = pool.alloc::<u32>(4, &s[0]).unwrap();
    s[0].synchronize().unwrap();
    let capture = s[0].begin_capture().unwrap();
    let mut scratch = pool.alloc::<u32>(4, &s[0]).unwrap();
    scratch.copy_from_device(&source, &s[0]).unwrap();
    target.copy_from_device(&scratch, &s[0]).unwrap();
    let inside = scratch.as_device_ptr();
    drop(scratch);
    let graph = capture.end().unwrap();
    let outside: Vec<_> = (0..50).map(|_| pool.alloc::<u32>(4, &s[1]).unwrap()).collect();
    assert!(outside.iter().all(|buffer| buffer.as_device_ptr() != inside));
    graph.launch(&s[0]).unwrap();
    assert_eq!(target.to_vec(&s[0]).unwrap(), [1, 2, 3, 4]);
}

#[test]
fn too_much_is_an_error_and_the_pool_goes_on() {
    let Some(gpu) = card() else { return };
    let s = streams(&gpu, 1);
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    assert!(matches!(pool.alloc::<u8>(1 << 50, &s[0]), Err(Error::OutOfMemory { .. })));
    let (free, _) = gpu.memory_info().unwrap();
    let most = pool.alloc_uninit::<u8>(free / 10 * 9, &s[0]).unwrap();
    assert!(matches!(pool.alloc_uninit::<u8>(free / 2, &s[0]), Err(Error::OutOfMemory { .. })));
    drop(most);
    pool.alloc_uninit::<u8>(free / 2, &s[0]).unwrap();
}

#[test]
fn trimming_does_not_wait_for_a_busy_card() {
    let Some(gpu) = card() else { return };
    let s = streams(&gpu, 2);
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    pool.reserve(1 << 30).unwrap();
    let other = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let busy = other.alloc_uninit::<u8>(4 << 30, &s[0]).unwrap();
    let start = std::time::Instant::now();
    // SAFETY: bytes are valid whatever they are.
    let mut zeros = unsafe { busy.assume_init() };
    for _ in 0..20 {
        zeros.set_zero(&s[0]).unwrap();
    }
    let issued = start.elapsed();
    let given = pool.trim(0).unwrap();
    let trimmed = start.elapsed() - issued;
    s[0].synchronize().unwrap();
    let done = start.elapsed();
    assert_eq!(given, 1 << 30);
    eprintln!("trim of 1 GiB took {trimmed:?} while work took {done:?}");
}

#[test]
fn loads_of_other_allocators_tests() {
    let Some(gpu) = card() else { return };
    let (free, _) = gpu.memory_info().unwrap();
    let scale = gpu_suite::Scale { count: 5000, largest: 256 << 20, cap: (free / 5 * 4).min(16_000 << 20) };
    gpu_suite::all(&gpu, scale);
}

#[test]
fn branches_of_a_graph_keep_to_their_own() {
    let Some(gpu) = card() else { return };
    let s = streams(&gpu, 2);
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let capture = s[0].begin_capture().unwrap();
    s[1].wait_for(&s[0]).unwrap();
    assert!(s[1].is_capturing());
    let left = pool.alloc::<u8>(1 << 20, &s[0]).unwrap();
    let place = left.as_device_ptr();
    drop(left);
    let right = pool.alloc::<u8>(1 << 20, &s[1]).unwrap();
    assert_ne!(right.as_device_ptr(), place);
    drop(right);
    s[0].wait_for(&s[1]).unwrap();
    let graph = capture.end().unwrap();
    graph.launch(&s[1]).unwrap();
    drop(graph);
    gpu.synchronize().unwrap();
    pool.check().unwrap();
    assert!(!pool.has_leaks());
}

#[test]
fn two_cards_reach_each_other() {
    let Some(gpu) = card() else { return };
    let Ok(second) = GpuDevice::open(1) else {
        return eprintln!("skipped, there is one card here");
    };
    let (a, b) = (gpu.new_stream().unwrap(), second.new_stream().unwrap());
    let near = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let far = DevicePool::new(&second, PoolConfig::default_gpu()).unwrap();
    let error = near.alloc::<u8>(1, &b).unwrap_err();
    assert!(matches!(error, Error::InvalidOperation(_)), "{error}");
    let source = near.alloc_from_host(&vec![7u32; 1 << 20], &a).unwrap();
    let mut target = far.alloc::<u32>(1 << 20, &b).unwrap();
    target.copy_from_device(&source, &b).unwrap();
    drop(source);
    assert!(target.to_vec(&b).unwrap().iter().all(|&x| x == 7));
}

/// cudarc's own calls on our buffers, and buffers that change hands.
mod cudarc_interop {
    use std::sync::Arc;

    use cudarc::cublas::sys::cublasOperation_t::CUBLAS_OP_N;
    use cudarc::cublas::{CudaBlas, Gemm, GemmConfig};
    use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
    use cudarc::driver::{CudaContext, CudaStream, LaunchConfig, PushKernelArg};
    use memory_pool::{DeviceBuffer, DevicePool, GpuDevice, PinnedPool, PoolConfig, Stream};

    struct Both {
        _card: super::Card,
        context: Arc<CudaContext>,
        theirs: Arc<CudaStream>,
        gpu: GpuDevice,
        stream: Stream,
        pool: DevicePool,
    }

    fn both() -> Option<Both> {
        let _card = super::card()?;
        let context = CudaContext::new(0).unwrap();
        let theirs = context.new_stream().unwrap();
        let gpu = GpuDevice::from_cuda_context(&context).unwrap();
        let stream = gpu.stream_from_cuda(&theirs).unwrap();
        let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
        Some(Both { _card, context, theirs, gpu, stream, pool })
    }

    fn numbers(count: usize) -> Vec<f32> {
        (0..count).map(|x| x as f32).collect()
    }

    #[test]
    fn copies_and_fills() {
        let Some(Both { _card, context, theirs, gpu, stream, pool }) = both() else { return };
        let source = numbers(1000);
        // On the bound stream, and home on another one.
        for home in [stream.clone(), gpu.new_stream().unwrap()] {
            let mut buffer = pool.alloc::<f32>(1000, &home).unwrap();
            let mut copy = pool.alloc::<f32>(1000, &home).unwrap();
            let mut bound = buffer.for_cuda(&theirs).unwrap();
            theirs.memcpy_htod(&source, &mut bound).unwrap();
            assert_eq!(theirs.clone_dtoh(&bound).unwrap(), source);
            let mut second = copy.for_cuda(&theirs).unwrap();
            theirs.memcpy_dtod(&bound, &mut second).unwrap();
            theirs.memset_zeros(&mut bound).unwrap();
            // A call on yet another stream is ordered as well.
            let elsewhere = context.new_stream().unwrap();
            assert_eq!(elsewhere.clone_dtoh(&second).unwrap(), source);
            drop((bound, second));
            assert_eq!(copy.to_vec(&home).unwrap(), source);
            assert_eq!(buffer.to_vec(&home).unwrap(), vec![0.0; 1000]);
        }
        // Page-locked memory of ours as their host side.
        let pinned = PinnedPool::new(&gpu, PoolConfig::default_gpu()).unwrap();
        let mut host = pinned.alloc_from(&source).unwrap();
        let mut buffer = pool.alloc::<f32>(1000, &stream).unwrap();
        let mut bound = buffer.for_cuda(&theirs).unwrap();
        theirs.memcpy_htod(&host, &mut bound).unwrap();
        host.fill(0.0);
        theirs.memcpy_dtoh(&bound, &mut host).unwrap();
        assert_eq!(*host, *source);
    }

    #[test]
    fn launches() {
        const PTX: &str = r"
.version 7.0
.target sm_50
.address_size 64
.visible .entry add(.param .u64 into, .param .u64 from, .param .u32 len)
{
    .reg .pred %p;
    .reg .f32 %f<2>;
    .reg .b32 %r<5>;
    .reg .b64 %d<4>;
    ld.param.u64 %d0, [into];
    ld.param.u64 %d3, [from];
    ld.param.u32 %r0, [len];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mad.lo.s32 %r4, %r1, %r2, %r3;
    setp.ge.u32 %p, %r4, %r0;
    @%p bra done;
    cvta.to.global.u64 %d0, %d0;
    cvta.to.global.u64 %d3, %d3;
    mul.wide.u32 %d1, %r4, 4;
    add.s64 %d2, %d0, %d1;
    add.s64 %d1, %d3, %d1;
    ld.global.f32 %f0, [%d2];
    ld.global.f32 %f1, [%d1];
    add.f32 %f0, %f0, %f1;
    st.global.f32 [%d2], %f0;
done:
    ret;
}";
        let Some(Both { _card, context, theirs, stream, pool, .. }) = both() else { return };
        let module = context.load_module(cudarc::nvrtc::Ptx::from_src(PTX)).unwrap();
        let kernel = module.load_function("add").unwrap();
        let mut into = pool.alloc_from_host(&numbers(5000), &stream).unwrap();
        let mut from = pool.alloc_from_host(&numbers(5000), &stream).unwrap();
        let len = 5000u32;
        let (mut first, second) = (into.for_cuda(&theirs).unwrap(), from.for_cuda(&theirs).unwrap());
        let mut launch = theirs.launch_builder(&kernel);
        launch.arg(&mut first).arg(&second).arg(&len);
        // SAFETY: the kernel touches `len` elements of both buffers, and takes these three arguments.
        unsafe { launch.launch(LaunchConfig::for_num_elems(len)) }.unwrap();
        drop((first, second));
        let doubled: Vec<f32> = numbers(5000).iter().map(|x| x * 2.0).collect();
        assert_eq!(into.to_vec(&stream).unwrap(), doubled);
    }

    #[test]
    fn products_of_matrices() {
        let Some(Both { _card, theirs, stream, pool, .. }) = both() else { return };
        // SAFETY: only asks whether the library can be loaded.
        if !unsafe { cudarc::cublas::sys::is_culib_present() } {
            return eprintln!("skipped, there is no cuBLAS here");
        }
        const N: usize = 64;
        let blas = CudaBlas::new(theirs.clone()).unwrap();
        let unit: Vec<f32> = (0..N * N).map(|at| f32::from(u8::from(at / N == at % N))).collect();
        let mut a = pool.alloc_from_host(&numbers(N * N), &stream).unwrap();
        let mut b = pool.alloc_from_host(&unit, &stream).unwrap();
        let mut c = pool.alloc::<f32>(N * N, &stream).unwrap();
        let n = N as i32;
        let config = GemmConfig {
            transa: CUBLAS_OP_N,
            transb: CUBLAS_OP_N,
            m: n,
            n,
            k: n,
            alpha: 2.0,
            lda: n,
            ldb: n,
            beta: 0.0,
            ldc: n,
        };
        let (left, right) = (a.for_cuda(&theirs).unwrap(), b.for_cuda(&theirs).unwrap());
        let mut product = c.for_cuda(&theirs).unwrap();
        // SAFETY: all three are N by N.
        unsafe { blas.gemm(config, &left, &right, &mut product) }.unwrap();
        drop((left, right, product));
        let doubled: Vec<f32> = numbers(N * N).iter().map(|x| x * 2.0).collect();
        assert_eq!(c.to_vec(&stream).unwrap(), doubled);
    }

    #[test]
    fn slices_are_adopted() {
        let Some(Both { _card, theirs, gpu, stream, pool, .. }) = both() else { return };
        let source = numbers(1000);
        let slice = theirs.clone_htod(&source).unwrap();
        let copied = memory_pool::gpu::copy_from_cuda(&pool, &slice, &theirs).unwrap();
        assert_eq!(copied.to_vec(&stream).unwrap(), source);
        for home in [stream.clone(), gpu.new_stream().unwrap()] {
            let place = {
                let slice = theirs.clone_htod(&source).unwrap();
                let mut adopted = DeviceBuffer::adopt_cuda(&pool, slice, &home).unwrap();
                assert_eq!(adopted.to_vec(&home).unwrap(), source);
                let other = gpu.new_stream().unwrap();
                adopted.copy_from_device(&copied, &other).unwrap();
                adopted.record_stream(&other).unwrap();
                adopted.set_zero(&home).unwrap();
                assert_eq!(adopted.slice(10..20).unwrap().to_vec(&home).unwrap(), [0.0; 10]);
                adopted.as_device_ptr()
            };
            assert!(!pool.owns(std::ptr::NonNull::new(place as *mut u8).unwrap()), "it is not the pool's");
        }
        let adopted = DeviceBuffer::adopt_cuda(&pool, theirs.clone_htod(&source).unwrap(), &stream).unwrap();
        assert!(adopted.into_raw().unwrap_err().to_string().contains("not the pool's"));
        let empty = DeviceBuffer::adopt_cuda(&pool, theirs.null::<f32>().unwrap(), &stream).unwrap();
        assert!(empty.is_empty());
        theirs.synchronize().unwrap();
        assert_eq!(pool.active_allocations().len(), 1, "the copy");
    }

    #[test]
    fn buffers_are_lent() {
        let Some(Both { _card, context, theirs, gpu, stream, pool }) = both() else { return };
        let source = numbers(1000);
        let elsewhere = context.new_stream().unwrap();
        for (home, on) in [(stream.clone(), &theirs), (gpu.new_stream().unwrap(), &elsewhere)] {
            let buffer = pool.alloc_from_host(&source, &home).unwrap();
            let mut lent = buffer.into_cuda(on).unwrap();
            assert_eq!(on.clone_dtoh(&*lent).unwrap(), source);
            let theirs_now = lent.try_clone().unwrap();
            on.memset_zeros(&mut lent.as_view_mut()).unwrap();
            let back = lent.into_buffer();
            assert_eq!(back.to_vec(&home).unwrap(), vec![0.0; 1000]);
            assert_eq!(on.clone_dtoh(&theirs_now).unwrap(), source);
            // Dropped while work is in flight: the memory comes back to the pool after it.
            let mut lent = back.into_cuda(on).unwrap();
            on.memset_zeros(&mut lent.as_view_mut()).unwrap();
            drop(lent);
            let next = pool.alloc_from_host(&source, &home).unwrap();
            assert_eq!(next.to_vec(&home).unwrap(), source);
        }
        assert!(!pool.has_leaks());
        context.check_err().unwrap();
    }

    /// Leaks on purpose: to be left out where leaks are looked for.
    #[test]
    fn leaked_slices_are_never_reused() {
        let Some(Both { _card, theirs, stream, pool, .. }) = both() else { return };
        let source = numbers(1000);
        let lent = pool.alloc_from_host(&source, &stream).unwrap().into_cuda(&theirs).unwrap();
        theirs.memset_zeros(&mut lent.try_clone().unwrap()).unwrap();
        std::mem::forget(lent);
        assert_eq!(pool.active_allocations().len(), 1);
        for _ in 0..10 {
            let next = pool.alloc_from_host(&source, &stream).unwrap();
            assert_eq!(next.to_vec(&stream).unwrap(), source);
        }
    }

    #[test]
    fn their_captures_have_memory_of_their_own() {
        let Some(Both { _card, context, theirs, gpu, stream, .. }) = both() else { return };
        let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().max_size(4 << 20)).unwrap();
        pool.reserve(4 << 20).unwrap();
        let mut target = pool.alloc::<u8>(512 << 10, &stream).unwrap();
        theirs.synchronize().unwrap();
        let far = CudaContext::new(1).ok();
        context.bind_to_thread().unwrap();
        let capturing = || {
            std::thread::scope(|scope| {
                let asks = scope.spawn(|| {
                    // With no context that is current, and with another card's.
                    let none = stream.is_capturing();
                    if let Some(far) = &far {
                        far.bind_to_thread().unwrap();
                    }
                    (none, stream.is_capturing())
                });
                asks.join().unwrap()
            })
        };
        assert_eq!(capturing(), (false, false));
        theirs.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL).unwrap();
        assert!(stream.is_capturing());
        assert_eq!(capturing(), (true, true));
        let scratch = pool.alloc::<u8>(1 << 20, &stream).unwrap();
        let place = scratch.as_device_ptr();
        target.set_zero(&stream).unwrap();
        drop(scratch);
        let again = pool.alloc::<u8>(1 << 20, &stream).unwrap();
        assert_eq!(again.as_device_ptr(), place, "the capture reuses its own");
        drop(again);
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = theirs.end_capture(flags).unwrap().unwrap();
        let other = gpu.new_stream().unwrap();
        for round in 1..20u8 {
            graph.launch().unwrap();
            let taken = pool.alloc_from_host(&vec![round; 1 << 20], &other).unwrap();
            assert_ne!(taken.as_device_ptr(), place);
            assert!(taken.to_vec(&other).unwrap().iter().all(|&byte| byte == round));
        }
        assert!(pool.alloc_uninit::<u8>(3 << 20, &other).is_err(), "some is the graph's");
        drop(target);
        drop(graph);
        context.synchronize().unwrap();
        let free = (0..2000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            pool.alloc_uninit::<u8>(4 << 20, &other).is_ok()
        });
        assert!(free, "the graph is gone");
        pool.check().unwrap();
    }

    #[test]
    fn streams_of_another_context_are_refused() {
        let Some(Both { _card, theirs, pool, .. }) = both() else { return };
        let simulated = GpuDevice::simulated(memory_pool::SimConfig::default());
        assert!(simulated.stream_from_cuda(&theirs).is_err());
        let far = simulated.new_stream().unwrap();
        let slice = theirs.clone_htod(&numbers(10)).unwrap();
        assert!(DeviceBuffer::adopt_cuda(&pool, slice, &far).is_err());
    }
}
