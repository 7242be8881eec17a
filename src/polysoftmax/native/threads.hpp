// Threads that share the pieces of one call. The caller starts at once and takes pieces like any helper; it waits only for
// pieces that a helper has begun. Helpers sleep between calls, so they never compete with another library's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <pthread.h>
#include <thread>

class Team {
  public:
    // After a fork the child has no helpers and a lock that may be held: it starts with a new team and leaves the old one.
    static Team& current() {
        static const bool registered = [] {
            instance().store(new Team);
            return pthread_atfork(nullptr, nullptr, [] { instance().store(new Team(instance().load()->wanted)); }) == 0;
        }();
        (void)registered;
        return *instance().load();
    }

    explicit Team(int threads = 0) : wanted(threads) {}

    void set_threads(int threads) { wanted.store(threads > 0 ? threads : 0); }

    int threads() const {
        int count = wanted.load();
        return count ? count : (int)std::max(1u, std::thread::hardware_concurrency());
    }

    void share(int64_t count, void (*piece)(void*, int64_t), void* context) {
        Job job{piece, context, count};
        int helpers_wanted = (int)std::min<int64_t>(threads(), count) - 1;
        if (helpers_wanted > 0) publish(job, helpers_wanted);
        work(job);
        if (helpers_wanted > 0) withdraw(job);
    }

  private:
    struct Job {
        void (*piece)(void*, int64_t);
        void* context;
        int64_t count;
        std::atomic<int64_t> next{0};
        int seats = 0, helpers = 0;    // who may still join, and who has; under the lock
        Job* behind = nullptr;

        Job(void (*piece)(void*, int64_t), void* context, int64_t count) : piece(piece), context(context), count(count) {}
    };

    std::atomic<int> wanted;
    std::mutex lock;
    std::condition_variable wake, left;
    Job* jobs = nullptr;
    int hired = 0;

    static std::atomic<Team*>& instance() {
        static std::atomic<Team*> one{nullptr};
        return one;
    }

    static void work(Job& job) {
        for (int64_t k; (k = job.next.fetch_add(1)) < job.count;) job.piece(job.context, k);
    }

    void publish(Job& job, int seats) {
        std::lock_guard<std::mutex> held(lock);
        for (; hired < seats; hired++) {
            if (!hire()) break;
        }
        job.seats = seats;
        job.behind = jobs;
        jobs = &job;
        for (int i = 0; i < seats; i++) wake.notify_one();
    }

    void withdraw(Job& job) {
        std::unique_lock<std::mutex> held(lock);
        Job** at = &jobs;
        while (*at != &job) at = &(*at)->behind;
        *at = job.behind;
        while (job.helpers) left.wait(held);
    }

    // A system that gives no more threads leaves the work to those that there are.
    bool hire() {
        pthread_t thread;
        auto start = [](void* team) -> void* {
            ((Team*)team)->help();
            return nullptr;
        };
        if (pthread_create(&thread, nullptr, start, this)) return false;
        pthread_detach(thread);
        return true;
    }

    void help() {
        std::unique_lock<std::mutex> held(lock);
        for (;;) {
            Job* job = jobs;
            while (job && !(job->seats && job->next.load() < job->count)) job = job->behind;
            if (!job) {
                wake.wait(held);
                continue;
            }
            job->seats--;
            job->helpers++;
            held.unlock();
            work(*job);
            held.lock();
            if (--job->helpers == 0) left.notify_all();
        }
    }
};
