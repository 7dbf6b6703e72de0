//! The vCPUs of a machine: which are there, and their coming and going.

use std::io;
use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use memory_types::Mtrrs;

use super::StartError;
use crate::boot::Entry;
use crate::kvm::refused;
use crate::vcpu::{self, Context, Vcpu, cpuid, registers};

/// All vCPUs of a machine, present and possible ones.
pub(super) struct Vcpus {
    vm: Arc<VmFd>,
    supported: CpuId,
    context: Context,
    places: Vec<Place>,
}

/// What is at an APIC id.
enum Place {
    /// Nothing runs. KVM cannot forget a vCPU: one that was there is kept for the next time.
    Absent(Option<VcpuFd>),
    /// A vCPU runs.
    Running(Vcpu),
    /// A vCPU was told to stop and has not answered yet.
    Stopping(Vcpu),
}

impl Vcpus {
    /// Makes the first `count` of at most `max` vCPUs: the first one enters the kernel, the others wait for it to start
    /// them.
    pub(super) fn new(
        (count, max): (u8, u8),
        kvm: &Kvm,
        vm: &Arc<VmFd>,
        entry: Entry,
        context: Context,
    ) -> Result<Self, StartError> {
        vcpu::install_handler();
        let supported =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("say what CPUID it supports"))?;
        let mut vcpus = Self { vm: Arc::clone(vm), supported, context, places: Vec::new() };
        vcpus.places.resize_with(usize::from(max), || Place::Absent(None));
        for id in 0..count {
            let fd = vcpus.create(id, &Mtrrs::BOOT).map_err(refused("create a vCPU"))?;
            if id == 0 {
                registers::enter(&fd, entry).map_err(refused("set the first vCPU's registers"))?;
            }
            vcpus.places[usize::from(id)] = Place::Absent(Some(fd));
        }
        Ok(vcpus)
    }

    /// A vCPU as it is after power-on, but for its memory types. CPUID comes first: KVM judges registers by it.
    fn create(&self, id: u8, mtrrs: &Mtrrs) -> io::Result<VcpuFd> {
        let max = u8::try_from(self.places.len()).map_err(io::Error::other)?;
        let fd = self.vm.create_vcpu(u64::from(id))?;
        fd.set_cpuid2(&cpuid::for_vcpu(&self.supported, id, max)?)?;
        registers::set_msrs(&fd, mtrrs)?;
        Ok(fd)
    }

    /// Lets the vCPUs run that were made with the machine.
    pub(super) fn start_all(&mut self) -> io::Result<()> {
        let made: Vec<u8> = self.ids(|place| matches!(place, Place::Absent(Some(_))));
        made.into_iter().try_for_each(|id| self.run(id))
    }

    fn ids(&self, wanted: impl Fn(&Place) -> bool) -> Vec<u8> {
        let all = (0_u8..).zip(&self.places);
        all.filter(|(_, place)| wanted(place)).map(|(id, _)| id).collect()
    }

    /// How many run.
    pub(super) fn present(&self) -> u8 {
        u8::try_from(self.running().len()).unwrap_or(u8::MAX)
    }

    /// The most there may be.
    pub(super) fn max(&self) -> u8 {
        u8::try_from(self.places.len()).unwrap_or(u8::MAX)
    }

    /// The ids of those that run, ascending.
    pub(super) fn running(&self) -> Vec<u8> {
        self.ids(|place| matches!(place, Place::Running(_)))
    }

    /// The ids at which one may start, ascending.
    pub(super) fn free(&self) -> Vec<u8> {
        self.ids(|place| matches!(place, Place::Absent(_)))
    }

    /// Starts the vCPU at a free id, with these memory types: it waits for the guest to start it.
    ///
    /// # Errors
    /// When KVM or the host refuses.
    pub(super) fn start(&mut self, id: u8, mtrrs: &Mtrrs) -> io::Result<()> {
        let Some(place) = self.places.get_mut(usize::from(id)) else { return Ok(()) };
        match place {
            Place::Absent(Some(fd)) => registers::await_start(fd, mtrrs)?,
            Place::Absent(kept) => {
                *kept = None;
                let fd = self.create(id, mtrrs)?;
                // KVM delivers the guest's start signal by a table of APICs, which it brought up to date before the new
                // vCPU was in it: setting an APIC makes it do so again.
                fd.set_lapic(&fd.get_lapic()?)?;
                self.places[usize::from(id)] = Place::Absent(Some(fd));
            }
            Place::Running(_) | Place::Stopping(_) => return Ok(()),
        }
        self.run(id)
    }

    fn run(&mut self, id: u8) -> io::Result<()> {
        let Some(place) = self.places.get_mut(usize::from(id)) else { return Ok(()) };
        if let Place::Absent(kept) = place
            && let Some(fd) = kept.take()
        {
            *place = Place::Running(Vcpu::start(id, fd, self.context.clone())?);
        }
        Ok(())
    }

    /// Asks a vCPU for its memory types; it answers with an event. False when none runs there.
    pub(super) fn ask_memory_types(&self, id: u8) -> bool {
        let place = self.places.get(usize::from(id));
        if let Some(Place::Running(vcpu)) = place {
            vcpu.ask_memory_types();
            return true;
        }
        false
    }

    /// Tells a vCPU to stop; it answers with an event.
    pub(super) fn stop(&mut self, id: u8) {
        let Some(place) = self.places.get_mut(usize::from(id)) else { return };
        *place = match std::mem::replace(place, Place::Absent(None)) {
            Place::Running(vcpu) => {
                vcpu.stop();
                Place::Stopping(vcpu)
            }
            other => other,
        };
    }

    /// A vCPU that was told to stop has answered.
    pub(super) fn stopped(&mut self, id: u8) {
        let Some(place) = self.places.get_mut(usize::from(id)) else { return };
        *place = match std::mem::replace(place, Place::Absent(None)) {
            Place::Stopping(vcpu) => Place::Absent(vcpu.join()),
            other => other,
        };
    }

    /// Lets all vCPUs stand still, or run again. Those that stand still answer with an event.
    pub(super) fn pause(&self, paused: bool) {
        for place in &self.places {
            match place {
                Place::Running(vcpu) if paused => vcpu.pause(),
                Place::Running(vcpu) => vcpu.resume(),
                Place::Absent(_) | Place::Stopping(_) => {}
            }
        }
    }

    /// Tells all to stop.
    pub(super) fn stop_all(&mut self) {
        (0..self.max()).for_each(|id| self.stop(id));
    }

    /// Waits for those that were told to stop.
    pub(super) fn join_all(&mut self) {
        (0..self.max()).for_each(|id| self.stopped(id));
    }
}
