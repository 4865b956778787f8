//! Launches a kernel on pool memory: PTX through cudarc on a real card, a Rust closure on the simulated device.

use memory_pool::gpu::Touch;
use memory_pool::{DevicePool, GpuDevice, PoolConfig, SimConfig};

/// `x[i] = x[i] * 2 + 1`, one thread an element.
#[cfg(feature = "cuda")]
const PTX: &str = r"
.version 7.0
.target sm_50
.address_size 64
.visible .entry twice_plus_one(.param .u64 data, .param .u32 len)
{
    .reg .pred %p;
    .reg .f32 %f;
    .reg .b32 %r<5>;
    .reg .b64 %d<3>;
    ld.param.u64 %d0, [data];
    ld.param.u32 %r0, [len];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mad.lo.s32 %r4, %r1, %r2, %r3;
    setp.ge.u32 %p, %r4, %r0;
    @%p bra done;
    cvta.to.global.u64 %d0, %d0;
    mul.wide.u32 %d1, %r4, 4;
    add.s64 %d2, %d0, %d1;
    ld.global.f32 %f, [%d2];
    fma.rn.f32 %f, %f, 0f40000000, 0f3F800000;
    st.global.f32 [%d2], %f;
done:
    ret;
}";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let source: Vec<f32> = (0..1000).map(|x| x as f32).collect();
    let expected: Vec<f32> = source.iter().map(|x| x * 2.0 + 1.0).collect();
    #[cfg(feature = "cuda")]
    if GpuDevice::count() > 0 {
        use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};
        let context = CudaContext::new(0)?;
        let theirs = context.new_stream()?;
        let kernel =
            context.load_module(cudarc::nvrtc::Ptx::from_src(PTX))?.load_function("twice_plus_one")?;
        let gpu = GpuDevice::from_cuda_context(&context)?;
        let stream = gpu.stream_from_cuda(&theirs)?;
        let pool = DevicePool::new(&gpu, PoolConfig::default_gpu())?;
        let mut buffer = pool.alloc_from_host(&source, &stream)?;
        let len = source.len() as u32;
        let bound = buffer.for_cuda(&theirs)?;
        let mut launch = theirs.launch_builder(&kernel);
        launch.arg(&bound).arg(&len);
        // SAFETY: the kernel touches `len` elements of the buffer, and takes these two arguments.
        unsafe { launch.launch(LaunchConfig::for_num_elems(len)) }?;
        drop(bound);
        assert_eq!(buffer.to_vec(&stream)?, expected);
        println!("{}: the kernel ran on pool memory", gpu.name());
        return Ok(());
    }
    let gpu = GpuDevice::simulated(SimConfig::default());
    let stream = gpu.new_stream()?;
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu())?;
    let buffer = pool.alloc_from_host(&source, &stream)?;
    let (at, bytes) = (buffer.as_device_ptr() as usize, source.len() * 4);
    let sim = gpu.simulation().ok_or("not simulated")?;
    sim.launch(&stream, 2_000, &[Touch::write(at, bytes)], move |memory| {
        let mut element = [0; 4];
        for place in (at..at + bytes).step_by(4) {
            memory.read(place, &mut element);
            memory.write(place, &(f32::from_ne_bytes(element) * 2.0 + 1.0).to_ne_bytes());
        }
    })?;
    assert_eq!(buffer.to_vec(&stream)?, expected);
    assert!(sim.hazards().is_empty());
    println!("{}: the kernel ran on pool memory", gpu.name());
    Ok(())
}
